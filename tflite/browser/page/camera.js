// The worker that classifies: loads what the camera needs, and keeps out of the benchmark's way.

import { download, hasInt8 } from "./benchmark.js";
import { Runtime } from "./client.js";

const THREADS = 4;
const STUCK_SECONDS = 20;

/** Waits for the promise, whatever becomes of it, but not longer. */
export function within(seconds, promise) {
  const timeout = new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  return Promise.race([promise.then(() => {}).catch(() => {}), timeout]);
}

/**
 * @param job what the server says
 * @param models the graphs' files, as far as the benchmark has loaded them
 * @param {() => boolean} measuring whether the benchmark runs
 * @returns `run(file, input)`: runs a graph, by its number, or "flows"; rejects while the benchmark runs.
 *     `ready()`: loads everything, for when the server will be gone. `idle()`: waits until nothing is under way.
 */
export function camera(job, models, measuring) {
  const loaded = new Map();
  const pending = new Set();
  let runtime = null; // the promise of {client, threads}
  let newest = null; // the client, as soon as its worker exists

  function tracked(promise) {
    const done = () => pending.delete(promise);
    pending.add(promise);
    promise.then(done, done);
    return promise;
  }

  async function started(threads) {
    const client = (newest = new Runtime());
    try {
      await client.start({ accelerator: "wasm", threads, helpers: (threads - 1) * (job.graphs.length + 1) });
      return { client, threads };
    } catch (error) {
      client.close();
      if (threads === 1 || newest !== client) throw error;
      return started(1);
    }
  }

  async function loadInto(client, file, threads) {
    const url = file === "flows" ? job.flows.url : job.graphs[file].url;
    const bytes = models[file] ? models[file].bytes : await download(url);
    await client.load({ key: file, bytes, threads, int8: file !== "flows" && hasInt8(job.graphs[file]) });
  }

  async function load(file) {
    const threads = self.crossOriginIsolated ? Math.min(THREADS, navigator.hardwareConcurrency || 1) : 1;
    const mine = (runtime = runtime || started(threads));
    try {
      const { client, threads: granted } = await mine;
      if (!loaded.has(file)) loaded.set(file, loadInto(client, file, granted));
      await loaded.get(file);
      return client;
    } catch (error) {
      loaded.delete(file); // the next try may succeed: a phone leaves its network now and then
      if (runtime === mine && loaded.size === 0) forget();
      throw error;
    }
  }

  function forget() {
    if (newest) newest.close();
    runtime = newest = null;
    loaded.clear();
  }

  function refuse() {
    if (measuring()) throw new Error("The benchmark is running; wait until it is done.");
  }

  async function loadAndRun(file, input) {
    const client = await load(file);
    refuse(); // it may have begun while the file was loaded
    return client.run(file, [{ name: "", data: input }]);
  }

  async function run(file, input) {
    refuse();
    return tracked(loadAndRun(file, input));
  }

  async function loadAll() {
    for (const file of [...job.graphs.keys(), ...(job.flows ? ["flows"] : [])]) {
      await load(file).catch(() => {}); // it says so when it is used; the result does not depend on it
    }
  }

  const ready = async () => job.classify && tracked(loadAll());

  async function idle() {
    await within(STUCK_SECONDS, Promise.all([...pending].map((promise) => promise.catch(() => {}))));
    if (pending.size) forget();
  }

  return { run, ready, idle };
}
