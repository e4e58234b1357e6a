"""Image files to pixels: one decoder for the check of a folder and for the pipeline."""

import struct

import tensorflow as tf

_SIGNATURES = {  # format: where its signature starts, and the signature
    "JPEG": (0, b"\xff\xd8\xff"),
    "PNG": (0, b"\x89PNG\r\n\x1a\n"),
    "GIF": (0, b"GIF8"),
    "BMP": (0, b"BM"),
    "WebP": (8, b"WEBP"),
}


def image_format(content: bytes) -> str:
    """One of "JPEG", "PNG", "GIF", "BMP" and "WebP" by the first bytes; "" for anything else."""
    return next((name for name, (start, magic) in _SIGNATURES.items() if content[start:].startswith(magic)), "")


def is_animated_webp(content: bytes) -> bool:
    """Whether a WebP file has several pictures: bit 1 of the flags in its VP8X chunk (WebP container specification).

    TensorFlow 2.21 must not be given one: `decode_webp` of a file of two pictures that Pillow 13 had written ended the
    process with "munmap_chunk(): invalid pointer".
    """
    return content[12:16] == b"VP8X" and len(content) > 20 and bool(content[20] & 2)


def bmp_problem(content: bytes) -> str:
    """Why TensorFlow would refuse a BMP file or show wrong colours; "" for nothing (the file may still be damaged).

    TensorFlow 2.21 goes by the number of bits for a pixel alone. It was seen to take indices into a palette (8 bits)
    for grey values and the colours to be in their usual order whatever the masks in the file say, and to call 1, 4 and
    16 bits, compressed files and those with a header of OS/2 damaged. What is left: 24 bits, 32 bits with blue first,
    and 8 bits with a palette in which the colour of index i is the grey value i.

    Args:
        content: the bytes of a BMP file. Fields and places as in Microsoft's BITMAPFILEHEADER (14 bytes) and
            BITMAPINFOHEADER (40 bytes, which later headers extend).

    Returns:
        What is the matter and what to do.
    """
    if len(content) < 54:
        return ""
    pixels_start, header_size = struct.unpack_from("<II", content, 10)
    bits, compression = struct.unpack_from("<HI", content, 28)
    (colours,) = struct.unpack_from("<I", content, 46)
    if header_size >= 40 and bits in (1, 2, 4, 8):
        start = 14 + header_size
        palette = content[start : min(pixels_start, start + 4 * min(colours or 256, 256))]  # blue, green, red, unused
        ramp = bytes(range(len(palette) // 4))
        if bits < 8 or not ramp or any(palette[channel : 4 * len(ramp) : 4] != ramp for channel in range(3)):
            return "a palette BMP; convert it to PNG"
    masks_of_blue_first = compression == 3 and content[54:66] == struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    if header_size < 40 or bits not in (8, 24, 32) or not (compression == 0 or (bits == 32 and masks_of_blue_first)):
        return "a BMP of a kind that TensorFlow does not decode; convert it to PNG"
    return ""


def image_problem(content: bytes) -> str:
    """Why a file with these bytes cannot be trained on; "" for nothing.

    The decoder is that of the pipeline, so whatever passes here can be trained on. Looking at the structure of a JPEG
    file is not enough: truncated ones pass that. Decoding it to an eighth of its size reads all of it, and is faster.
    """
    if not content:
        return "the file is empty"
    kind = image_format(content)
    if not kind:
        return "not a JPEG, PNG, GIF, BMP or WebP image"
    if kind == "WebP" and is_animated_webp(content):
        return "an animated WebP image; convert it to PNG or JPEG"
    if kind == "BMP" and (problem := bmp_problem(content)):
        return problem
    try:
        with tf.device("CPU:0"):
            if kind == "JPEG":
                tf.io.decode_jpeg(content, channels=3, ratio=8)
            else:
                decode_image(tf.constant(content))
    except (tf.errors.OpError, ValueError):
        return f"truncated or damaged {kind} data"
    return ""


def has_format(content: tf.Tensor, name: str) -> tf.Tensor:
    """Whether a string tensor [], of 12 bytes or more, has the format `name`: bool []."""
    start, magic = _SIGNATURES[name]
    return tf.strings.substr(content, start, len(magic)) == magic


def decode_image(content: tf.Tensor) -> tf.Tensor:
    """Decodes a file of any format that `image_format` names; of BMP files those without a `bmp_problem`.

    Grey images get three equal channels; CMYK becomes RGB; 16 bits become 8; of a GIF the first picture counts; what is
    transparent in a PNG or WebP file shows white (but not the single transparent colour that a PNG file without alpha
    channel and palette may name). BMP files are opaque.

    Args:
        content: string [], the bytes of the file.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not an image, or not all of one.
    """

    def decode(channels: int) -> tf.Tensor:
        return tf.io.decode_image(content, channels, expand_animations=False)

    # 0 asks for as many channels as there are. TensorFlow 2.21, asked for 4, makes PNG images of less than 8 bits
    # nearly transparent (alpha 1 of 255 for a palette of 1 bit), and refuses WebP images that have 3.
    return tf.cond(
        has_format(content, "PNG") | has_format(content, "WebP"), lambda: _on_white(decode(0)), lambda: decode(3)
    )


def _on_white(image: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 1 .. 4], grey or RGB, with or without alpha, to [H, W, 3]: colour x alpha + white x (1 - alpha)."""
    height, width, channels = tf.unstack(tf.shape(image))
    has_alpha = channels % 2 == 0
    colour = tf.broadcast_to(image[..., : channels - tf.cast(has_alpha, tf.int32)], [height, width, 3])

    def blend() -> tf.Tensor:
        alpha = tf.cast(image[..., -1:], tf.float32) / 255
        return tf.cast(tf.round(255 + (tf.cast(colour, tf.float32) - 255) * alpha), tf.uint8)

    return tf.cond(has_alpha, blend, lambda: colour)
