// A classic worker, because LiteRT.js loads its WebAssembly with importScripts, which module workers do not have.
"use strict";

const runtime = import("./runtime.js");
const queue = { last: Promise.resolve() }; // requests are answered one after the other

self.onmessage = ({ data: { id, name, argument } }) => {
  queue.last = queue.last.then(async () => {
    try {
      const value = await (await runtime).answer(name, argument);
      self.postMessage({ id, value });
    } catch (error) {
      self.postMessage({ id, error: String((error && error.message) || error).split("\n")[0] });
    }
  });
};
