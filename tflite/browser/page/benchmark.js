// Runs a job: loads every graph with every configuration, checks its outputs, and times rounds in turns. No DOM here.

import { Runtime } from "./client.js";
import { printable } from "./phone.js";

const STEPS_OF_THE_CLOCK = 20; // the count of invocations is chosen for so many in a latency, an error of 5 %
const LEAST_STEPS = 12; // a round with a shorter latency is measured again
const CALIBRATING = 3; // latencies of which the fastest chooses the count: one may have been interrupted
const MOST_INVOCATIONS = 100000;
const ARRAYS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array, int8: Int8Array };

// Fetches a file of the job; `onBytes` is told of the bytes so far.
export async function download(url, onBytes = () => {}) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} could not be loaded (${response.status})`);
  if (!response.body) return response.arrayBuffer();
  const reader = response.body.getReader();
  const parts = [];
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onBytes((size += value.length));
  }
  const bytes = new Uint8Array(size);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes.buffer;
}

// The graph's inputs and expected outputs: [{name, data, ...}].
export async function downloadTensors(tensors) {
  return Promise.all(
    tensors.map(async (tensor) => ({ ...tensor, data: new ARRAYS[tensor.dtype](await download(tensor.url)) })),
  );
}

// Measures. `models` holds each graph's {bytes, inputs, outputs}; `watch` has `step(text)`, called before each step,
// `measured(configuration, graph, latencies)`, and `check()`, which throws where measuring must end.
// -> {entries, resolution, gpu}; an entry is {skipped: reason} or {graphs: [measurement, ...]}, one a configuration.
export async function benchmark(job, models, watch) {
  const runtimes = new Map();
  const found = { entries: [], resolution: null, gpu: null };
  const turns = [];
  try {
    for (const configuration of job.configurations) {
      const prepared = await prepare(job, models, configuration, runtimes, watch, found);
      found.entries.push(
        prepared.skipped ? prepared : { graphs: prepared.turns.map(({ measurement }) => measurement) },
      );
      turns.push(...(prepared.turns || []));
    }
    await measure(job, turns, watch);
  } finally {
    for (const runtime of runtimes.values()) runtime.close();
  }
  return found;
}

export function steps(job) {
  return job.configurations.length * job.graphs.length * (1 + job.rounds.length);
}

// Whether LiteRT.js' public tensors cannot hold what goes into the graph or comes out of it; see runtime.js.
export function hasInt8({ inputs, outputs }) {
  return [...inputs, ...outputs].some(({ dtype }) => dtype === "int8");
}

class Mismatch extends Error {}

// One configuration made ready, with all graphs or, so that ratios have both sides, with none.
async function prepare(job, models, configuration, runtimes, watch, found) {
  const turns = [];
  let name = "";
  try {
    const { runtime, started } = await runtimeFor(job, configuration, runtimes);
    if (found.resolution === null || started.resolution > found.resolution) found.resolution = started.resolution;
    found.gpu = found.gpu || started.gpu;
    for (const [number, graph] of job.graphs.entries()) {
      name = `${graph.name}: `;
      watch.check();
      watch.step(`${configuration.name}: loading ${graph.name}`);
      const key = `${number}/${configuration.name}`;
      const turn = { configuration, number, runtime, key, resolution: started.resolution };
      turn.measurement = await loadAndCheck(job, graph, models[number], turn);
      turns.push(turn);
    }
    return { turns };
  } catch (error) {
    watch.check();
    if (error instanceof Mismatch) throw error;
    return { skipped: printable(name + error.message) };
  }
}

// One thread, several and the GPU need different builds of LiteRT.js, hence a worker each.
async function runtimeFor(job, { backend, num_threads: threads }, runtimes) {
  const cores = navigator.hardwareConcurrency || 1;
  if (backend === "WASM" && threads > cores) throw new Error(`this browser offers ${cores} cores`);
  const kind = backend === "WebGPU" ? "gpu" : threads > 1 ? "threads" : "one";
  if (!runtimes.has(kind)) {
    const runtime = new Runtime();
    runtimes.set(kind, runtime);
    const usable = job.configurations.filter((one) => one.backend === "WASM" && one.num_threads <= cores);
    const helpers = usable.reduce((sum, one) => sum + (one.num_threads - 1) * job.graphs.length, 0);
    runtime.started = runtime.start({ accelerator: kind === "gpu" ? "webgpu" : "wasm", threads, helpers });
  }
  const runtime = runtimes.get(kind);
  return { runtime, started: await runtime.started };
}

async function loadAndCheck(job, graph, { bytes, inputs, outputs }, { configuration, runtime, key, resolution }) {
  const { backend, num_threads: threads } = configuration;
  const { seconds, fullyAccelerated } = await runtime.load({ key, bytes, threads, int8: hasInt8(graph) });
  const first = await runtime.run(key, inputs);
  const error = outputError(outputs, first.outputs);
  const tolerance = graph.tolerances[backend];
  if (!(error <= tolerance)) {
    const found = Number.isFinite(error) ? `lie ${error.toPrecision(3)} of their range` : "lie without bound";
    throw new Mismatch(
      `the outputs of ${graph.name} with ${configuration.name} are wrong: they ${found} from those of the computer's ` +
        `LiteRT, ${tolerance} is allowed. Nothing was measured.`,
    );
  }
  const least = async (unrecorded, invocations) =>
    Math.min(...(await runtime.time({ key, unrecorded, recorded: CALIBRATING, invocations })));
  let invocations = 1;
  let latency = await least(job.warmup, invocations);
  while (latency * invocations < STEPS_OF_THE_CLOCK * resolution && invocations < MOST_INVOCATIONS) {
    const wanted = latency > 0 ? Math.ceil((1.2 * STEPS_OF_THE_CLOCK * resolution) / latency) : 0;
    invocations = Math.min(MOST_INVOCATIONS, Math.max(2 * invocations, wanted));
    latency = await least(0, invocations);
  }
  return {
    load_seconds: seconds,
    first_run_seconds: first.milliseconds / 1000,
    output_error: error,
    invocations,
    fully_accelerated: fullyAccelerated,
    rounds: [],
  };
}

// Rounds over all turns, each round starting with another one, so that heat meets all alike.
async function measure(job, turns, watch) {
  for (const [round, recorded] of job.rounds.entries()) {
    const start = turns.length ? round % turns.length : 0;
    for (const turn of [...turns.slice(start), ...turns.slice(0, start)]) {
      watch.step(
        `${job.graphs[turn.number].name}, ${turn.configuration.name}: round ${round + 1} of ${job.rounds.length}`,
      );
      turn.measurement.rounds.push(await timeRound(turn, recorded, watch.check));
      watch.measured(turn.configuration, turn.number, turn.measurement.rounds.flat());
    }
    if (round + 1 < job.rounds.length) await new Promise((resolve) => setTimeout(resolve, 1000 * job.cooldown_seconds));
  }
  watch.check();
}

// The latencies of one round, again with more invocations each while the fastest is too short for the clock: the browser
// compiles what runs often a second time, so a small graph may become ten times faster after its count was chosen.
// `check` throws where measuring must end.
export async function timeRound({ key, runtime, measurement, resolution }, recorded, check) {
  for (;;) {
    check();
    const { invocations } = measurement;
    const latencies = await runtime.time({ key, unrecorded: 1, recorded, invocations });
    const enough = Math.min(...latencies) * invocations >= LEAST_STEPS * resolution;
    if (enough || invocations >= MOST_INVOCATIONS) return latencies;
    measurement.invocations = Math.min(MOST_INVOCATIONS, 2 * invocations);
  }
}

// What was found for an expected output: by its name, or by its place where LiteRT.js has another name for it.
export function outputOf(expected, index, outputs) {
  return outputs[expected[index].name] || Object.values(outputs)[index];
}

// The greatest difference over all outputs, relative to the largest expected value of that output; Infinity for NaN.
export function outputError(expected, outputs) {
  if (Object.keys(outputs).length !== expected.length) return Infinity;
  let worst = 0;
  for (const [index, { data, scale, zero_point: zero }] of expected.entries()) {
    const found = outputOf(expected, index, outputs).data;
    if (found.length !== data.length) return Infinity;
    const real = (value) => (scale ? (value - zero) * scale : value);
    let difference = 0;
    let largest = 1e-30;
    for (let i = 0; i < data.length; i++) {
      const distance = Math.abs(real(found[i]) - real(data[i]));
      if (!(distance <= difference)) difference = Number.isNaN(distance) ? Infinity : distance;
      largest = Math.max(largest, Math.abs(real(data[i])));
    }
    worst = Math.max(worst, difference / largest);
  }
  return worst;
}
