// The section of the page that classifies: camera or picture, the likeliest classes, and what the heads do.

import { dequantize, mostProbable, softmax } from "./answers.js";
import { outputOf } from "./benchmark.js";
import { gradient, mostSelectiveHead, paint } from "./heatmap.js";
import { decode, openCamera, Problem, readable } from "./pixels.js";
import { normalize, prepare, quantize } from "./preprocess.js";

const FRAME_MILLISECONDS = 250; // between two pictures of the camera: a few a second leave the phone cool
const SHOWN_CLASSES = 5;
const FLOWS = ["competition", "allocation"];
const MEANING = {
  competition: "how strongly each token offers its value; 1 on average",
  allocation: "how much of the mixed values the head lets through at each token",
};

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/**
 * Fills the section and shows it; without metadata of classes it stays hidden.
 *
 * @param {HTMLElement} section
 * @param {{graphs: object[], classify: ?object, flows: ?object}} job what the server says of the graphs
 * @param {(file: number | "flows", input) => Promise<{outputs: object, milliseconds: number}>} run one inference
 */
export function mountClassify(section, job, run) {
  if (!job.classify) return;
  const view = build(section, job);
  const state = { picture: null, turn: 0, stream: null, request: 0, flows: null };
  const used = new Set();

  /** One inference; a file's first one, which makes the runtime ready, is repeated: its time says nothing. */
  async function timed(file, input) {
    if (!used.has(file)) await run(file, input);
    used.add(file);
    return run(file, input);
  }

  function complain(error) {
    if (!(error instanceof Problem)) console.warn(error);
    view.problem.textContent = error.message;
    view.results.hidden = true; // they are of another picture
    section.dataset.state = "problem";
  }

  /** Shows the answer to an ImageBitmap or the promise of one; whether neither an error nor a later call came first. */
  async function classify(promised) {
    const turn = ++state.turn;
    section.dataset.state = "busy";
    try {
      const picture = await promised;
      if (turn !== state.turn) {
        if (picture !== state.picture) picture.close();
        return false;
      }
      if (picture !== state.picture) state.picture?.close();
      state.picture = picture;
      const found = await answer(job, timed, picture, Number(view.graph.value), view.negative.value);
      if (turn !== state.turn) return false;
      state.flows = found.flows;
      showAnswer(view, found);
      if (found.flows) showFlows(view, job, found.flows);
      view.problem.textContent = "";
      section.dataset.state = "done";
      return true;
    } catch (error) {
      if (turn === state.turn) complain(error);
      return false;
    }
  }

  function open(file) {
    stop();
    classify(decode(file));
  }

  function stop() {
    state.request++;
    end(state.stream);
    state.stream = view.video.srcObject = null;
    showCamera(false);
  }

  function showCamera(on) {
    view.video.hidden = !on;
    section.classList.toggle("live", on);
    view.camera.textContent = on ? "Stop" : "Camera";
  }

  /** Classifies what the camera sees, until it is stopped or something fails. */
  async function watch(request) {
    view.camera.disabled = true; // while the browser asks whether it may
    const stream = await openCamera().finally(() => (view.camera.disabled = false));
    if (request !== state.request || document.hidden) return end(stream); // a photo was chosen, or the page was left
    view.video.srcObject = state.stream = stream;
    showCamera(true);
    await view.video.play();
    while (state.stream === stream) {
      const began = performance.now();
      const ended = stream.getTracks().some((track) => track.readyState === "ended");
      if (ended) throw new Problem("The camera has stopped. Start it again.");
      if (!(await classify(createImageBitmap(view.video)))) break;
      const rest = FRAME_MILLISECONDS - (performance.now() - began);
      await new Promise((resume) => setTimeout(resume, Math.max(rest, 0)));
    }
    if (state.stream === stream) stop();
  }

  view.camera.onclick = async () => {
    if (state.stream) return stop(); // the last picture and its answer stay
    const request = ++state.request;
    try {
      await watch(request);
    } catch (error) {
      if (request !== state.request) return; // play() rejects when it is stopped
      stop();
      complain(error);
    }
  };
  view.file.onchange = () => {
    const [file] = view.file.files;
    view.file.value = ""; // so that the same file can be chosen again
    if (file) open(file);
  };
  view.graph.onchange = view.negative.onchange = () => {
    if (state.picture && !state.stream) classify(state.picture); // the camera's next picture comes anyway
  };
  view.layer.onchange = () => state.flows && showFlows(view, job, state.flows);
  section.ondragover = (event) => {
    event.preventDefault();
    section.classList.add("over");
  };
  section.ondragleave = () => section.classList.remove("over");
  section.ondrop = (event) => {
    event.preventDefault();
    section.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) open(file);
    else complain(new Problem("That was not a file. Drop a picture file here."));
  };
  document.addEventListener("visibilitychange", () => document.hidden && state.stream && stop());
  section.classList.add("card");
  section.hidden = false;
}

function end(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}

/** The elements of the section, by name. */
function build(section, job) {
  const view = {
    camera: element("button", { type: "button", className: "camera", textContent: "Camera" }),
    file: element("input", { type: "file", accept: "image/*" }),
    video: element("video", { muted: true, playsInline: true, hidden: true }),
    problem: element("p", { className: "problem", role: "alert" }),
    graph: element("select", { ariaLabel: "Model" }),
    negative: element("select", { ariaLabel: "Light and dark" }),
    image: element("canvas", { className: "image" }),
    caption: element("figcaption"),
    answers: element("ol", { className: "answers" }),
    time: element("p", { className: "time" }),
    layer: element("select", { ariaLabel: "Layer" }),
    flows: element("div", { className: "flows", hidden: true }),
  };
  const [height, width] = job.classify.image_size;
  view.video.style.aspectRatio = `${width} / ${height}`; // the part that is cut out, and a margin
  view.results = element("div", { className: "results", hidden: true });
  fillSelects(view, job);
  for (const name of FLOWS) {
    const parts = {
      canvas: element("canvas"),
      parts: { heat: element("canvas"), image: element("canvas") }, // of which the first one is made
      caption: element("figcaption"),
      bar: element("div", { className: "bar" }),
    };
    parts.bar.style.background = gradient(name);
    view[name] = parts;
    parts.figure = element("figure", { className: name }, parts.canvas, parts.bar, parts.caption);
  }
  const photo = element("label", { className: "photo" }, "Photo", view.file);
  view.flows.append(
    element("h3", { textContent: "Attention flows" }),
    element("label", {}, "Layer ", view.layer),
    element("div", { className: "pair" }, view.competition.figure, view.allocation.figure),
  );
  view.results.append(
    element("figure", { className: "seen" }, view.image, view.caption),
    element("div", {}, view.answers, view.time),
    view.flows,
  );
  section.replaceChildren(
    element("h2", { textContent: "Classify" }),
    element("div", { className: "controls" }, view.camera, photo, ...view.choices),
    element("p", { className: "hint", textContent: "or drop a picture here" }),
    view.problem,
    view.video,
    view.results,
  );
  return view;
}

function fillSelects(view, job) {
  const option = (value, textContent) => element("option", { value, textContent });
  job.graphs.forEach((graph, index) => {
    if (logitsOf(graph, job.classify)) view.graph.append(option(index, graph.name));
  });
  if (!view.graph.length && job.flows) view.graph.append(option(-1, "model with flows"));
  view.negative.append(
    option("automatic", "light on dark: automatic"),
    option("never", "as it is"),
    option("always", "negative"),
  );
  view.choices = [];
  if (view.graph.length > 1) view.choices.push(view.graph);
  if (job.classify.light_on_dark) view.choices.push(view.negative);
  (job.flows?.flows ?? []).forEach((layer, index) => view.layer.append(option(index, layer.layer)));
  view.layer.value = view.layer.length - 1;
}

/** The output of a graph that has one number for each class. */
function logitsOf(graph, { classes }) {
  return graph.outputs.find(({ shape }) => shape.length === 2 && shape[1] === classes.length);
}

/** Prepares the picture, runs the graph and, if there is one, the model with flows. */
async function answer(job, run, bitmap, graphIndex, negative) {
  const { classify: metadata, graphs, flows } = job;
  const source = readable(bitmap);
  const preparedFor = (size) => {
    const began = performance.now();
    const { values, isNegative } = prepare(source, size, metadata, negative);
    return { size, values, isNegative, input: normalize(values, metadata), preparation: performance.now() - began };
  };
  const graph = graphs[graphIndex];
  const flowsSize = flows && (flows.image_size ?? metadata.image_size);
  // All of the picture is read before anything is waited for: a later one may close it.
  const seen = preparedFor(graph ? graph.input.shape.slice(1, 3) : flowsSize);
  const own = !flows || `${flowsSize}` === `${seen.size}` ? seen : preparedFor(flowsSize);
  const found = { seen, picture: `${bitmap.width} x ${bitmap.height}`, flows: null };

  let logits = null;
  if (graph) {
    const { outputs, milliseconds } = await run(graphIndex, quantize(seen.input, graph.input));
    const index = graph.outputs.indexOf(logitsOf(graph, metadata));
    logits = dequantize(outputOf(graph.outputs, index, outputs).data, graph.outputs[index]);
    found.milliseconds = milliseconds;
  }
  if (flows) {
    const { outputs, milliseconds } = await run("flows", own.input);
    logits ??= outputs.logits.data;
    found.milliseconds ??= milliseconds;
    found.flows = { outputs, seen: own };
  }
  found.classes = mostProbable(softmax(logits), metadata.classes, SHOWN_CLASSES);
  return found;
}

function showAnswer(view, { seen, picture, milliseconds, classes }) {
  paintValues(view.image, seen.values, seen.size);
  const [height, width] = seen.size;
  const negative = seen.isNegative ? ", negative" : "";
  view.caption.textContent = `What the model sees: ${width} x ${height} of ${picture}${negative}`;
  view.answers.replaceChildren(
    ...classes.map(({ index, name, probability }) => {
      const bar = element("span", { className: "bar" });
      bar.style.width = `${100 * probability}%`;
      const percent = element("span", { className: "percent", textContent: `${(100 * probability).toFixed(1)} %` });
      const row = element("li", {}, element("span", { className: "name", textContent: name }), percent, bar);
      Object.assign(row.dataset, { index, probability });
      return row;
    }),
  );
  const preparation = seen.preparation.toFixed(1);
  view.time.textContent = `${milliseconds.toFixed(2)} ms for the model, ${preparation} ms to prepare the picture`;
  view.results.hidden = false;
}

function showFlows(view, job, { outputs, seen }) {
  const layer = job.flows.flows[Number(view.layer.value)];
  const head = mostSelectiveHead(outputs[layer.competition].data, layer.heads);
  for (const name of FLOWS) {
    const { pixels, least, most } = paint(name, outputs[layer[name]].data, head, layer);
    overlay(view[name], pixels, layer.grid, seen.values, seen.size);
    const range = `${least.toFixed(2)} to ${most.toFixed(2)}`;
    view[name].caption.textContent = `${name}, head ${head} of ${layer.heads}: ${range} (${MEANING[name]})`;
  }
  view.flows.hidden = false;
}

/** A canvas of RGB values [height, width, 3] in 0 .. 255. */
function paintValues(canvas, values, [height, width]) {
  [canvas.width, canvas.height] = [width, height];
  const pixels = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) pixels[4 * pixel + channel] = values[3 * pixel + channel];
  }
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

/** A heat map over the image, one square for each token. */
function overlay({ canvas, parts }, pixels, [rows, columns], image, [height, width]) {
  const { heat } = parts;
  [heat.width, heat.height] = [columns, rows];
  heat.getContext("2d").putImageData(new ImageData(pixels, columns, rows), 0, 0);
  const scale = Math.ceil(336 / width); // small images enlarged, so that the squares have sharp edges
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(paintValues(parts.image, image, [height, width]), 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.7;
  context.drawImage(heat, 0, 0, canvas.width, canvas.height);
}
