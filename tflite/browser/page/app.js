// The page: what it shows, and the order of things. Measuring is benchmark.js.

import { benchmark, download, downloadTensors, steps } from "./benchmark.js";
import { camera, within } from "./camera.js";
import { mountClassify } from "./classify.js";
import { Runtime } from "./client.js";
import { drawHistogram, milliseconds, summarize } from "./histogram.js";
import { describePhone, printable } from "./phone.js";

const NOT_SAVED = "The result could not be handed to the computer";
const CAMERA_SECONDS = 20; // for loading what the camera needs before the server goes

const element = (id) => document.getElementById(id);
let busy = false;
let aborted = null; // why measuring must end

document.addEventListener("visibilitychange", () => {
  if (document.hidden && busy)
    aborted = "The page went to the background while it measured. Keep it open and start again.";
});

main().catch((error) => notice(error.message, "bad"));

async function main() {
  const job = await (await fetch("job.json")).json();
  const phone = await describePhone();
  showPhone(phone, await gpuSupport());
  showPlan(job);
  const models = [];
  const own = camera(job, models, () => busy);
  mountClassify(element("classify"), job, own.run);
  element("start").disabled = false;
  element("start").addEventListener("click", () => start(job, phone, models, own));
}

async function start(job, phone, models, { ready, idle }) {
  busy = true;
  aborted = null;
  notice(null);
  phone.name = printable(element("name").value.trim() || phone.name, 80);
  for (const id of ["plan", "results"]) element(id).hidden = true;
  element("name").disabled = true;
  element("running").hidden = false;
  element("cards").replaceChildren();
  element("skipped").replaceChildren();
  const unlock = await keepAwake();
  try {
    await loadModels(job, models);
    await idle();
    const found = await benchmark(job, models, watch(job));
    element("stage").textContent = "Handing over";
    if (!job.stay) await within(CAMERA_SECONDS, ready()); // the server stops once it has the result
    await post("result", { phone: complete(phone, found), entries: found.entries });
    finished(job, found);
    if (job.stay) ready(); // so that the camera goes on when the server is stopped
  } catch (error) {
    await failed(job, phone, error.message);
  } finally {
    busy = false;
    unlock();
    element("running").hidden = true;
    element("name").disabled = false;
  }
}

async function loadModels(job, models) {
  const total = job.graphs.reduce((sum, { size_bytes: size }) => sum + size, 0);
  let before = 0;
  element("stage").textContent = "Loading models";
  for (const [number, graph] of job.graphs.entries()) {
    element("step").textContent = graph.name;
    models[number] = models[number] || {
      bytes: await download(graph.url, (bytes) => progress((before + bytes) / total)),
      inputs: await downloadTensors(graph.inputs),
      outputs: await downloadTensors(graph.outputs),
    };
    before += graph.size_bytes;
  }
  if (job.flows) models.flows = models.flows || { bytes: await download(job.flows.url) };
}

function watch(job) {
  const total = steps(job);
  let done = 0;
  return {
    check: () => {
      if (aborted) throw new Error(aborted);
    },
    step: (text) => {
      element("stage").textContent = "Measuring";
      element("step").textContent = text;
      progress(done / total);
      post("progress", { done, total }).catch(() => {}); // the terminal's bar may miss a step
      done = Math.min(done + 1, total);
    },
    measured: (configuration, number, latencies) => {
      element("results").hidden = false;
      showResult(`${number}/${configuration.name}`, job.graphs[number].name, configuration.name, latencies);
    },
  };
}

function complete(phone, { gpu, resolution }) {
  return { ...phone, gpu: gpu && printable(gpu), timer_resolution_seconds: resolution || 1 };
}

function finished(job, found) {
  found.entries.forEach((entry, index) => {
    if (entry.skipped) addItem("skipped", `${job.configurations[index].name} was not measured: ${entry.skipped}.`);
  });
  const measured = found.entries.some(({ skipped }) => !skipped);
  element("results").hidden = false;
  element("policy").textContent = measured
    ? "Median of all runs, inputs already in the runtime's memory, outputs read back; the outputs agree with those of " +
      "the computer."
    : "";
  element("plan").hidden = !job.stay;
  element("start").textContent = measured ? "Measure again" : "Start again";
  const said = measured
    ? "Done. The computer has the result"
    : "Nothing could be measured, for the reasons below. The computer knows of it";
  notice(said + (job.stay ? "." : " and serves no longer."), measured ? "good" : "bad");
}

async function failed(job, phone, reason) {
  element("cards").replaceChildren();
  element("results").hidden = true;
  const here = reason.startsWith(NOT_SAVED) || reason === aborted; // what the computer need not know
  element("plan").hidden = !here && !job.stay;
  element("start").textContent = "Start again";
  notice(reason, "bad");
  if (here) return;
  await post("result", { phone: complete(phone, { gpu: null, resolution: null }), error: printable(reason) }).catch(
    () => {},
  );
}

async function post(name, value) {
  let response;
  try {
    response = await fetch(name, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(value),
      referrerPolicy: "same-origin", // with the page's "no-referrer" browsers may write "Origin: null"
    });
  } catch {
    throw new Error(`${NOT_SAVED}: it does not answer.`);
  }
  if (!response.ok) throw new Error(`${NOT_SAVED}: ${(await response.text()).trim()}`);
  return response.json();
}

// A phone that locks its screen stops the page.
async function keepAwake() {
  try {
    const lock = await navigator.wakeLock.request("screen");
    return () => lock.release();
  } catch {
    return () => {};
  }
}

async function gpuSupport() {
  if (!self.isSecureContext) return "no: it needs HTTPS or localhost";
  if (!navigator.gpu) return "not in this browser";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return adapter ? "yes" : "in this browser, but not on this device";
}

function threadSupport({ secure_context: secure, cross_origin_isolated: isolated, relaxed_simd: relaxed }) {
  if (!secure) return "no: they need HTTPS or localhost";
  if (!isolated) return "no";
  return relaxed ? "yes" : "no: LiteRT.js has them only with relaxed SIMD, which this browser lacks";
}

function showPhone(phone, gpu) {
  element("name").value = phone.name;
  element("name-hint").textContent = phone.model ? "" : "The browser does not say which phone this is: type its name.";
  const facts = {
    Browser: phone.browser,
    System: phone.os,
    Cores: phone.logical_cores || "not told",
    Threads: threadSupport(phone),
    WebGPU: gpu,
  };
  for (const [name, value] of Object.entries(facts)) {
    element("facts").append(text("dt", name), text("dd", String(value)));
  }
}

function showPlan(job) {
  for (const { name, size_bytes: size } of job.graphs) {
    const item = document.createElement("li");
    item.append(text("span", name), text("span", `${(size / 1e6).toFixed(2)} MB`));
    element("graphs").append(item);
  }
  const runs = job.rounds.reduce((sum, count) => sum + count, 0);
  const names = job.configurations.map(({ name }) => name).join("; ");
  element("settings").textContent =
    `${names}. ${job.warmup} warm-up runs and ${runs} timed runs each, in ${job.rounds.length} rounds.`;
  element("runtime").textContent = job.runtime;
}

function showResult(key, graph, configuration, latencies) {
  let card = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (!card) {
    card = document.createElement("article");
    card.className = "card result";
    card.dataset.key = key;
    const title = document.createElement("h3");
    title.append(text("span", graph), text("span", configuration));
    const histogram = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    card.append(title, text("p", "", "figure"), text("p", "", "detail"), histogram);
    element("cards").append(card);
  }
  const { median, p90 } = summarize(latencies);
  card.querySelector(".figure").replaceChildren(milliseconds(median), text("small", " ms"));
  card.querySelector(".detail").textContent = `median of ${latencies.length} runs, 90 % below ${milliseconds(p90)} ms`;
  drawHistogram(card.querySelector("svg"), latencies);
}

function progress(share) {
  element("bar").value = Math.min(1, share);
}

function notice(words, kind) {
  element("notice").hidden = words === null;
  element("notice").className = `notice ${kind || ""}`;
  element("notice").textContent = words ? words[0].toUpperCase() + words.slice(1) : "";
}

function addItem(list, words) {
  element(list).append(text("li", words));
}

function text(tag, words, kind) {
  const made = document.createElement(tag);
  made.textContent = words;
  if (kind) made.className = kind;
  return made;
}
