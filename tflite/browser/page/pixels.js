// Pictures from files and from the camera, and the sentences for those that cannot be read.

const LARGEST_FILE = 200e6; // bytes; nothing that a phone's camera makes is larger
const HEIC = /\.(heic|heif)$/i;

/** A mistake that the page shows as one line. */
export class Problem extends Error {}

/**
 * A picture file, decoded, upright (EXIF), its colours as they are stored.
 *
 * @param {File} file
 * @returns {Promise<ImageBitmap>}
 * @throws {Problem} it is empty, too large, or no picture that this browser reads
 */
export async function decode(file) {
  if (!file.size) throw new Problem(`${file.name} is empty. Choose another picture.`);
  if (file.size > LARGEST_FILE) {
    throw new Problem(
      `${file.name} has ${Math.round(file.size / 1e6)} MB; pictures may have ${LARGEST_FILE / 1e6} MB.`,
    );
  }
  try {
    return await bitmapOf(file);
  } catch {
    if (HEIC.test(file.name) || /hei[cf]/.test(file.type)) {
      throw new Problem(
        `${file.name} is HEIC, which only Safari reads: choose a JPEG or PNG file, or open this page in Safari.`,
      );
    }
    throw new Problem(`${file.name} is not a picture that this browser can read. Choose a JPEG, PNG or WebP file.`);
  }
}

async function bitmapOf(file) {
  try {
    // Training reads the stored values whatever profile they have; so does "none".
    return await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return createImageBitmap(file); // a browser that does not know these options
  }
}

let strip = null; // one canvas for all pictures: phones allow few, and free them late

/**
 * The picture of `resizedCut` over something that can be drawn on a canvas; what is transparent shows white.
 *
 * @param {ImageBitmap} bitmap
 */
export function readable(bitmap) {
  const canvas = (strip = strip || document.createElement("canvas"));
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
  return {
    width: bitmap.width,
    height: bitmap.height,
    read(left, top, width, height) {
      if (canvas.width !== width || canvas.height < height) [canvas.width, canvas.height] = [width, height];
      context.imageSmoothingEnabled = false; // setting the size resets it
      context.fillStyle = "white";
      context.fillRect(0, 0, width, height);
      context.drawImage(bitmap, left, top, width, height, 0, 0, width, height);
      return context.getImageData(0, 0, width, height).data;
    },
  };
}

/**
 * The camera at the back, else any.
 *
 * @returns {Promise<MediaStream>}
 * @throws {Problem} there is none, it is in use, or the user or the browser refuses
 */
export async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Problem("Browsers give the camera to pages over https only. On a phone Photo offers its camera app.");
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: false,
      video: { facingMode: { ideal: "environment" }, width: { ideal: 1280 }, height: { ideal: 720 } },
    });
  } catch (error) {
    throw new Problem(
      {
        NotAllowedError: "The camera was refused. Allow it in the browser's settings for this page, or use Photo.",
        NotFoundError: "There is no camera here. Use Photo.",
        NotReadableError: "The camera is in use by another app. Close that, or use Photo.",
      }[error.name] ?? `The camera does not start (${error.name}). Use Photo.`,
    );
  }
}
