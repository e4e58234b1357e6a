// Pictures of the flows of Mobile-Attention, as tools/draw_flows.py draws them.

// Every sixteenth colour of matplotlib's maps (CC0); between them the page interpolates.
export const MAPS = {
  competition:
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 fcfdbf",
  allocation:
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
};

const colours = Object.fromEntries(
  Object.entries(MAPS).map(([name, text]) => [
    name,
    text.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16))),
  ]),
);

/** The colour [red, green, blue] of a share in 0 to 1. */
export function colour(map, share) {
  const table = colours[map];
  const place = Math.min(Math.max(share, 0), 1) * (table.length - 1);
  const lower = Math.min(Math.floor(place), table.length - 2);
  return table[lower].map((value, channel) =>
    Math.round(value + (table[lower + 1][channel] - value) * (place - lower)),
  );
}

/** A CSS gradient of the map, dark to light. */
export function gradient(map) {
  return `linear-gradient(to right, ${MAPS[map]
    .split(" ")
    .map((hex) => `#${hex}`)
    .join(", ")})`;
}

/**
 * The head that chooses most: competition averages 1 over the tokens of a head, and this one strays furthest from it.
 *
 * @param {Float32Array} competition [heads, tokens]
 * @param {number} heads
 */
export function mostSelectiveHead(competition, heads) {
  const tokens = competition.length / heads;
  let [found, largest] = [0, -1];
  for (let head = 0; head < heads; head++) {
    const values = competition.subarray(head * tokens, (head + 1) * tokens);
    const mean = values.reduce((total, value) => total + value, 0) / tokens;
    const variance = values.reduce((total, value) => total + (value - mean) ** 2, 0) / tokens;
    if (variance > largest) [found, largest] = [head, variance];
  }
  return found;
}

/**
 * One head's flow as a picture of one pixel for each token of the image.
 *
 * @param {"competition" | "allocation"} map
 * @param {Float32Array} flow [heads, tokens]
 * @param {number} head
 * @param {{prefix: number, grid: [number, number], heads: number}} layer of tflite/flows.py
 * @returns {{pixels: Uint8ClampedArray, least: number, most: number}} RGBA [rows, columns], coloured from the least to
 *     the largest value
 */
export function paint(map, flow, head, layer) {
  const tokens = flow.length / layer.heads;
  const values = flow.subarray(head * tokens + layer.prefix, (head + 1) * tokens);
  const least = values.reduce((one, other) => Math.min(one, other), Infinity);
  const most = values.reduce((one, other) => Math.max(one, other), -Infinity);
  const pixels = new Uint8ClampedArray(4 * layer.grid[0] * layer.grid[1]);
  values.forEach((value, token) => {
    pixels.set([...colour(map, most > least ? (value - least) / (most - least) : 0), 255], 4 * token);
  });
  return { pixels, least, most };
}
