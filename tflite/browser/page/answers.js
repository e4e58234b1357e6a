// From the numbers that a model answers with to names and probabilities.

/** Real numbers of an output; `scale` and `zero_point` are those of tflite.inspect, null in float. */
export function dequantize(values, { scale, zero_point: zeroPoint }) {
  return scale === null || scale === undefined
    ? Float32Array.from(values)
    : Float32Array.from(values, (value) => (value - zeroPoint) * scale);
}

/** Probabilities of logits. */
export function softmax(logits) {
  const largest = logits.reduce((most, value) => Math.max(most, value), -Infinity);
  const powers = Float64Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/**
 * The most probable classes, the likeliest first.
 *
 * @param {ArrayLike<number>} probabilities
 * @param {string[]} names
 * @param {number} count
 * @returns {{index: number, name: string, probability: number}[]}
 */
export function mostProbable(probabilities, names, count = 5) {
  return Array.from(probabilities, (probability, index) => ({ index, name: names[index], probability }))
    .sort((one, other) => other.probability - one.probability || one.index - other.index)
    .slice(0, count);
}
