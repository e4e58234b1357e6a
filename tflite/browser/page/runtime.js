// LiteRT.js in a Web Worker: loads graphs, runs them, times them. Answers the requests of client.js.

import * as litert from "./litert/core.js";

const WASM = new URL("./litert/wasm/", import.meta.url).href;
const SPARE_THREADS = 2;
const RESOLUTION_CHANGES = 50;
const RESOLUTION_MILLISECONDS = 100;
const NOT_SHARED_OUT = "WebGPU takes not all of its operators, and this browser cannot share a graph out (no JSPI)";

const graphs = new Map();
let accelerator = null;
let shares = false; // whether graphs may be shared out between GPU and WASM

export function answer(name, argument) {
  const handlers = { start, load, run, time };
  return handlers[name](argument);
}

// Loads the build of LiteRT.js that fits: threads, else suspension of WebAssembly (JSPI) for the GPU, else neither.
// -> {build, gpu, resolution: seconds of the clock}
async function start(options) {
  accelerator = options.accelerator;
  const threads = options.threads > 1;
  if (threads && !self.crossOriginIsolated) throw new Error("this page is not isolated (it needs HTTPS or localhost)");
  if (threads && !(await litert.supportsFeature("relaxedSimd")))
    throw new Error("LiteRT.js has threads only with relaxed SIMD, which this browser lacks");
  if (accelerator === "webgpu" && !litert.isWebGPUSupported())
    throw new Error(self.isSecureContext ? "this browser has no WebGPU" : "WebGPU needs HTTPS or localhost");
  const relaxed = await litert.supportsFeature("relaxedSimd");
  const jspi = accelerator === "webgpu" && relaxed && (await litert.supportsFeature("jspi"));
  // From within a worker LiteRT.js would take the worker's own address for that of its files and its threads' script.
  self.Module = { locateFile: (file) => WASM + file, mainScriptUrlOrBlob: WASM + "litert_wasm_threaded_internal.js" };
  // LiteRT.js makes one thread per core at its start, and a graph that finds none left computes with fewer than it was
  // given, without a word. So it is told the number that all graphs together want.
  if (threads) Object.defineProperty(navigator, "hardwareConcurrency", { value: options.helpers + SPARE_THREADS });
  await litert.loadLiteRt(WASM, { threads, jspi });
  const device = accelerator === "webgpu" ? litert.getWebGpuDevice() : null;
  if (accelerator === "webgpu" && !device) throw new Error("WebGPU is there, but it offers no adapter");
  shares = jspi;
  return {
    build: threads ? "threaded" : jspi ? "jspi" : relaxed ? "simd" : "compat",
    gpu: describeGpu(device),
    resolution: resolution(),
  };
}

async function load({ key, bytes, threads, int8 }) {
  const before = performance.now();
  const graph = await open(new Uint8Array(bytes), { accelerator, cpuOptions: { numThreads: threads } }, int8);
  if (accelerator === "webgpu" && !graph.fullyAccelerated && !shares) throw new Error(NOT_SHARED_OUT);
  graphs.set(key, graph);
  return { seconds: (performance.now() - before) / 1000, fullyAccelerated: graph.fullyAccelerated };
}

async function run({ key, inputs }) {
  const graph = graphs.get(key);
  await graph.setInputs(inputs);
  const before = performance.now();
  const arrays = await graph.invoke();
  const milliseconds = performance.now() - before;
  const outputs = {};
  graph.outputs.forEach(({ name, shape, dtype }, index) => (outputs[name] = { shape, dtype, data: arrays[index] }));
  return { outputs, milliseconds };
}

// A latency spans `invocations` invocations and is divided by them; each reads the outputs into JavaScript arrays, which
// for a GPU is also what waits for it.
async function time({ key, unrecorded, recorded, invocations }) {
  const graph = graphs.get(key);
  for (let count = 0; count < unrecorded; count++) await graph.invoke();
  const latencies = [];
  for (let count = 0; count < recorded; count++) {
    const before = performance.now();
    for (let invocation = 0; invocation < invocations; invocation++) await graph.invoke();
    latencies.push((performance.now() - before) / 1000 / invocations);
  }
  return latencies;
}

// LiteRT.js' Tensor knows float32, int32 and uint8; it would refuse others only after having compiled the graph.
async function open(bytes, options, int8) {
  if (int8 && options.accelerator !== "wasm") throw new Error("LiteRT.js takes no int8 inputs and outputs on the GPU");
  if (int8) return Raw.open(bytes, options);
  const model = await litert.loadAndCompile(bytes, options);
  // Without JSPI LiteRT.js compiles a graph that the GPU takes in part a second time, for WASM, and returns that.
  if (model.options.accelerator !== options.accelerator) {
    model.delete();
    throw new Error(NOT_SHARED_OUT);
  }
  return new Compiled(model);
}

// A graph through LiteRT.js' public interface.
class Compiled {
  #model;
  #tensors = [];

  constructor(model) {
    this.#model = model;
    this.inputs = model.getInputDetails().map(describe);
    this.outputs = model.getOutputDetails().map(describe);
    this.fullyAccelerated = model.isFullyAccelerated;
  }

  async setInputs(inputs) {
    for (const tensor of this.#tensors.splice(0)) tensor.delete();
    for (const [index, data] of ordered(this.inputs, inputs).entries()) {
      const tensor = new litert.Tensor(data, this.inputs[index].shape);
      const types = this.#model.getInputDetails()[index].supportedBufferTypes;
      // Moves it to the GPU now, so that no invocation does.
      this.#tensors.push(types.has(tensor.bufferType) ? tensor : await tensor.moveTo(types.values().next().value));
    }
  }

  async invoke() {
    const results = await this.#model.run(this.#tensors);
    const arrays = [];
    for (const result of results) {
      arrays.push(await result.data());
      result.delete();
    }
    return arrays;
  }
}

// A graph with int8 inputs or outputs on WASM, through the WebAssembly module beneath the public interface.
class Raw {
  static async open(bytes, options) {
    const raw = new Raw();
    const module = (raw.module = litert.getGlobalLiteRt().liteRtWasm);
    const environment = (raw.environment = litert.getDefaultEnvironment().liteRtEnvironment);
    const pointer = module._malloc(bytes.byteLength); // kept for as long as the worker lives, if all goes well
    if (!pointer) throw new Error("this browser has not enough memory for the graph");
    let model;
    try {
      module.HEAPU8.set(bytes, pointer);
      model = module.loadModel(environment, pointer, bytes.byteLength);
      raw.compiled = await module.compileModel(environment, model, {
        ...options,
        environment: litert.getDefaultEnvironment(),
        gpuOptions: {},
        webNNOptions: {},
      });
    } catch (error) {
      if (model) model.delete();
      module._free(pointer);
      throw error;
    }
    const signature = model.getSignature(0);
    raw.inputs = items(signature.inputNames()).map((name, index) =>
      describeRaw(name, model.getInputTensorType(0, index)),
    );
    raw.outputs = items(signature.outputNames()).map((name, index) =>
      describeRaw(name, model.getOutputTensorType(0, index)),
    );
    raw.fullyAccelerated = raw.compiled.isFullyAccelerated();
    raw.buffers = [];
    return raw;
  }

  async setInputs(inputs) {
    for (const buffer of this.buffers.splice(0)) buffer.delete();
    for (const [index, data] of ordered(this.inputs, inputs).entries())
      this.buffers.push(this.#buffer(this.inputs[index], data));
  }

  async invoke() {
    const results = await this.compiled.run(0, this.buffers);
    return results.map((buffer, index) => {
      const { dtype } = this.outputs[index];
      const start = buffer.lock(this.module.LiteRtTensorBufferLockMode.READ);
      const bytes = this.module.HEAPU8.slice(start, start + buffer.packedSize());
      buffer.unlock();
      buffer.delete();
      return new ARRAYS[dtype](bytes.buffer);
    });
  }

  #buffer({ shape, dtype }, data) {
    const { module } = this;
    const sizes = new module.VectorInt32();
    shape.forEach((size) => sizes.push_back(size));
    const layout = module.LiteRtLayout.create(sizes);
    const type = module.LiteRtRankedTensorType.create({ value: ELEMENT_TYPES[dtype] }, layout);
    const host = module.LiteRtTensorBufferType.HOST_MEMORY;
    const buffer = module.LiteRtTensorBuffer.createManaged(this.environment, host, type, data.byteLength);
    for (const made of [sizes, layout, type]) made.delete();
    const start = buffer.lock(module.LiteRtTensorBufferLockMode.WRITE);
    module.HEAPU8.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), start);
    buffer.unlock();
    return buffer;
  }
}

const ELEMENT_TYPES = { float32: 1, int32: 2, uint8: 3, int8: 9 };
const ARRAYS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array, int8: Int8Array };

function describe({ name, shape, dtype }) {
  return { name, shape: [...shape], dtype };
}

function describeRaw(name, type) {
  const layout = type.layout();
  const element = type.elementType().value;
  const dtype = Object.keys(ELEMENT_TYPES).find((known) => ELEMENT_TYPES[known] === element);
  const shape = items(layout.dimensions());
  layout.delete();
  type.delete();
  if (!dtype) throw new Error(`${name} has a type that this page cannot pass to LiteRT.js`);
  return { name, shape, dtype };
}

function items(vector) {
  const values = Array.from({ length: vector.size() }, (_, index) => vector.get(index));
  vector.delete();
  return values;
}

// The data in the graph's order: by name where all names are known (signatures sort them), else as given.
function ordered(described, inputs) {
  if (inputs.length !== described.length)
    throw new Error(`the graph takes ${described.length} inputs, not ${inputs.length}`);
  const byName = new Map(inputs.map(({ name, data }) => [name, data]));
  const named = described.every(({ name }) => byName.has(name));
  return described.map(({ name }, index) => (named ? byName.get(name) : inputs[index].data));
}

function describeGpu(device) {
  const { vendor, architecture, device: model, description } = (device && device.adapterInfo) || {};
  return [vendor, architecture, model, description].filter(Boolean).join(" ") || (device ? "unnamed" : null);
}

// The smallest step in which the clock was seen to move, in seconds: browsers round it to make attacks harder.
function resolution() {
  const start = performance.now();
  let smallest = Infinity;
  let before = start;
  for (let changes = 0; changes < RESOLUTION_CHANGES && before - start < RESOLUTION_MILLISECONDS;) {
    const now = performance.now();
    if (now > before) {
      smallest = Math.min(smallest, now - before);
      changes++;
      before = now;
    }
  }
  return smallest / 1000;
}
