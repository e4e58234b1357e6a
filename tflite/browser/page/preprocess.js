// From the pixels of a picture to the input of a model, as mobiatt_tf/data (pipeline.py, crops.py) prepares test images.
//
// Bicubic (Keys, a = -1/2), the kernel widened where the picture becomes smaller, weights normalised at the edges: the
// sums of tf.image.resize(method="bicubic", antialias=True). Pictures come in strips of rows, so that one of 20
// megapixels needs no canvas of that size, which phones do not have.

const KERNEL_RADIUS = 2; // pixels, of the bicubic kernel
const STRIP_PIXELS = 1 << 18; // of a strip: 1 MiB of RGBA
const LUMA = [0.299, 0.587, 0.114]; // ITU-R BT.601, as Pillow turns RGB into grey
const LIGHT = 128; // of 255: above it the margin of a picture is light

/** Rounds halves to even, as TensorFlow and NumPy do. */
export function roundHalfToEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/**
 * To what size a picture is resized, and where the model's image is cut out of that.
 *
 * @param {{width: number, height: number}} picture in pixels
 * @param {[number, number]} imageSize [height, width] of the model's input
 * @param {number} cropFraction how much of the shorter side the cut keeps
 * @returns {{width, height, left, top}} the resized picture's size, and the cut's corner in it
 */
export function placement(picture, imageSize, cropFraction) {
  const [height, width] = imageSize;
  const f = Math.fround; // crops.py computes in float32, and what is rounded below may lie close to a half
  const fraction = f(cropFraction);
  const scale = Math.max(f(f(height / fraction) / picture.height), f(f(width / fraction) / picture.width));
  const resized = {
    width: Math.max(roundHalfToEven(f(picture.width * scale)), width),
    height: Math.max(roundHalfToEven(f(picture.height * scale)), height),
  };
  return { ...resized, left: Math.floor((resized.width - width) / 2), top: Math.floor((resized.height - height) / 2) };
}

/** The bicubic kernel at a distance in pixels (Keys 1981, a = -1/2). */
function bicubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

/**
 * Which pixels of one axis a resized pixel is made of.
 *
 * @param {number} size pixels of the axis
 * @param {number} newSize pixels after resizing
 * @param {number} first the first resized pixel wanted
 * @param {number} count how many are wanted
 * @returns {{start: number, weights: Float64Array}[]} for each, its first source pixel and the weights from there on
 */
export function taps(size, newSize, first, count) {
  const step = size / newSize;
  const stretch = Math.max(step, 1);
  return Array.from({ length: count }, (_, index) => {
    const centre = (first + index + 0.5) * step;
    const start = Math.max(Math.ceil(centre - KERNEL_RADIUS * stretch - 0.5), 0);
    const end = Math.min(Math.floor(centre + KERNEL_RADIUS * stretch - 0.5), size - 1);
    const weights = Float64Array.from({ length: end - start + 1 }, (_, tap) =>
      bicubic((start + tap + 0.5 - centre) / stretch),
    );
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/**
 * The cut of the resized picture.
 *
 * @param {{width: number, height: number, read: (left, top, width, height) => Uint8ClampedArray}} picture `read` gives
 *     the RGBA values of a rectangle, row by row
 * @param {[number, number]} imageSize [height, width] of the cut
 * @param {number} cropFraction see `placement`
 * @returns {Float32Array} [height, width, 3], RGB; bicubic curves overshoot 0 .. 255
 */
export function resizedCut(picture, imageSize, cropFraction) {
  const [height, width] = imageSize;
  const place = placement(picture, imageSize, cropFraction);
  const columns = taps(picture.width, place.width, place.left, width);
  const rows = taps(picture.height, place.height, place.top, height);
  const { first: left, past: right } = extent(columns);
  const { first: top, past: bottom } = extent(rows);

  // Rows of the picture, narrowed to the cut's width; then columns of that.
  const narrowed = new Float32Array((bottom - top) * width * 3);
  const stripRows = Math.max(Math.floor(STRIP_PIXELS / (right - left)), 1);
  for (let strip = top; strip < bottom; strip += stripRows) {
    const count = Math.min(stripRows, bottom - strip);
    const pixels = picture.read(left, strip, right - left, count);
    for (let row = 0; row < count; row++) {
      narrowRow(pixels, row * (right - left), left, columns, narrowed, (strip - top + row) * width * 3);
    }
  }
  const cut = new Float32Array(height * width * 3);
  rows.forEach(({ start, weights }, row) => {
    for (let at = 0; at < width * 3; at++) {
      let sum = 0;
      for (let tap = 0; tap < weights.length; tap++)
        sum += weights[tap] * narrowed[(start - top + tap) * width * 3 + at];
      cut[row * width * 3 + at] = sum;
    }
  });
  return cut;
}

function extent(axis) {
  const first = Math.min(...axis.map(({ start }) => start));
  return { first, past: Math.max(...axis.map(({ start, weights }) => start + weights.length)) };
}

function narrowRow(pixels, rowStart, left, columns, narrowed, target) {
  for (const { start, weights } of columns) {
    let [red, green, blue] = [0, 0, 0];
    for (let tap = 0; tap < weights.length; tap++) {
      const at = 4 * (rowStart + start - left + tap);
      red += weights[tap] * pixels[at];
      green += weights[tap] * pixels[at + 1];
      blue += weights[tap] * pixels[at + 2];
    }
    narrowed[target++] = red;
    narrowed[target++] = green;
    narrowed[target++] = blue;
  }
}

/** Grey values in all three channels of RGB values, in place. */
export function toGrey(values) {
  for (let at = 0; at < values.length; at += 3) {
    const grey = LUMA[0] * values[at] + LUMA[1] * values[at + 1] + LUMA[2] * values[at + 2];
    values.fill(grey, at, at + 3);
  }
  return values;
}

/** Whether the outermost pixels of [height, width, 3] values in 0 .. 255 are light on average. */
export function hasLightMargin(values, [height, width]) {
  let [sum, count] = [0, 0];
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      if (row % (height - 1) && column % (width - 1)) continue;
      for (let channel = 0; channel < 3; channel++) sum += values[(row * width + column) * 3 + channel];
      count += 3;
    }
  }
  return sum / count > LIGHT;
}

/**
 * The image that a model sees.
 *
 * @param picture see `resizedCut`
 * @param {[number, number]} imageSize [height, width] of the model's input
 * @param metadata of tflite/classes.py
 * @param {"automatic" | "never" | "always"} negative whether light and dark change places; "automatic": where the
 *     model's images are light on dark and the picture's margin is light
 * @returns {{values: Float32Array, isNegative: boolean}} [height, width, 3] in 0 .. 255
 */
export function prepare(picture, imageSize, metadata, negative = "automatic") {
  const cut = resizedCut(picture, imageSize, metadata.crop_fraction);
  if (metadata.channels === 1) toGrey(cut);
  const values = cut.map((value) => Math.min(Math.max(value, 0), 255));
  const isNegative =
    negative === "always" || (negative === "automatic" && metadata.light_on_dark && hasLightMargin(values, imageSize));
  return { values: isNegative ? values.map((value) => 255 - value) : values, isNegative };
}

/** (values / 255 - mean) / std for values [height, width, 3] in 0 .. 255. */
export function normalize(values, { mean, std }) {
  return values.map((value, at) => (value - 255 * mean[at % 3]) / (255 * std[at % 3]));
}

/**
 * Real numbers as a model's input takes them.
 *
 * @param {Float32Array} values
 * @param {{dtype: string, scale: ?number, zero_point: ?number}} input of tflite.inspect
 * @returns {Float32Array | Int8Array | Uint8Array}
 */
export function quantize(values, { dtype, scale, zero_point: zeroPoint }) {
  if (dtype === "float32") return values;
  const kinds = { int8: [Int8Array, -128, 127], uint8: [Uint8Array, 0, 255] };
  if (!(dtype in kinds)) throw new Error(`This page cannot fill a model's input of type ${dtype}.`);
  const [Kind, least, most] = kinds[dtype];
  return Kind.from(values, (value) =>
    Math.min(Math.max(roundHalfToEven(Math.fround(value / Math.fround(scale))) + zeroPoint, least), most),
  );
}
