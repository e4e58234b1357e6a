// Talks to worker.js. One worker holds one LiteRT.js runtime; every graph that it loads stays until it is closed.

export class Runtime {
  #worker = new Worker(new URL("./worker.js", import.meta.url));
  #pending = new Map();
  #next = 0;
  #closed = false;

  constructor() {
    this.#worker.onmessage = ({ data: { id, value, error } }) => {
      const { resolve, reject } = this.#pending.get(id);
      this.#pending.delete(id);
      if (error === undefined) resolve(value);
      else reject(new Error(error));
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#fail(event.message || "the worker could not be loaded");
    };
  }

  // {accelerator: "wasm" | "webgpu", threads, helpers} -> {build, gpu, resolution}; see runtime.js. `helpers`: with
  // threads > 1, the threads beside the first one that all graphs to be loaded want together.
  start(options) {
    return this.#request("start", options);
  }

  // {key, bytes, threads, int8} -> {seconds, fullyAccelerated}; `bytes` (an ArrayBuffer) is copied. `int8`: whether an
  // input or output is.
  load(options) {
    return this.#request("load", options);
  }

  // Sets the inputs, [{name, data: TypedArray}], and runs once -> {outputs: {name: {shape, dtype, data}}, milliseconds}.
  run(key, inputs) {
    return this.#request("run", { key, inputs });
  }

  // Latencies in seconds with the inputs set last: {key, unrecorded, recorded, invocations} -> [seconds, ...].
  time(options) {
    return this.#request("time", options);
  }

  close() {
    this.#closed = true;
    this.#worker.terminate();
    this.#fail("the worker was stopped");
  }

  #request(name, argument) {
    if (this.#closed) return Promise.reject(new Error("the worker was stopped"));
    return new Promise((resolve, reject) => {
      const id = this.#next++;
      this.#pending.set(id, { resolve, reject });
      this.#worker.postMessage({ id, name, argument });
    });
  }

  #fail(reason) {
    for (const { reject } of this.#pending.values()) reject(new Error(reason));
    this.#pending.clear();
  }
}
