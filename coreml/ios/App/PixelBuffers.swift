import CoreGraphics
import CoreVideo
import Foundation
import ImageIO

/// Makes the pixel buffers that Core ML takes as images.
enum PixelBuffers {
    /// Reads an RGB PNG file into a buffer with exactly its bytes: no colour conversion, no resampling.
    ///
    /// - Throws: `ModelError` if the file is missing, is not 8-bit RGB, or has another size.
    static func read(png url: URL, width: Int, height: Int) throws -> CVPixelBuffer {
        guard
            let source = CGImageSourceCreateWithURL(url as CFURL, nil),
            let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else {
            throw ModelError("The image \(url.lastPathComponent) is missing or damaged.")
        }
        if image.width != width || image.height != height {
            throw ModelError(
                "The image \(url.lastPathComponent) has \(image.width) x \(image.height) pixels,"
                    + " golden.json says \(width) x \(height)."
            )
        }
        guard image.bitsPerComponent == 8, let space = image.colorSpace, space.model == .rgb else {
            throw ModelError("The image \(url.lastPathComponent) is not an 8-bit RGB image.")
        }
        // The context has the image's own colour space, sRGB for a PNG file without a profile, so that drawing copies.
        return try make(width: width, height: height, space: space) { context in
            context.interpolationQuality = .none
            context.setBlendMode(.copy)
            context.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
        }
    }

    /// A buffer of medium grey.
    static func grey(width: Int, height: Int) throws -> CVPixelBuffer {
        guard let space = CGColorSpace(name: CGColorSpace.sRGB) else {
            throw ModelError("The system has no sRGB colour space.")
        }
        return try make(width: width, height: height, space: space) { context in
            context.setFillColor(red: 0.5, green: 0.5, blue: 0.5, alpha: 1)
            context.fill(CGRect(x: 0, y: 0, width: width, height: height))
        }
    }

    private static func make(
        width: Int,
        height: Int,
        space: CGColorSpace,
        draw: (CGContext) -> Void
    ) throws -> CVPixelBuffer {
        // A buffer backed by an IOSurface reaches the GPU and the Neural Engine without a copy.
        let attributes: [String: Any] = [kCVPixelBufferIOSurfacePropertiesKey as String: [String: Any]()]
        var created: CVPixelBuffer?
        let status = CVPixelBufferCreate(
            kCFAllocatorDefault,
            width,
            height,
            kCVPixelFormatType_32BGRA,
            attributes as CFDictionary,
            &created
        )
        guard status == kCVReturnSuccess, let buffer = created else {
            throw ModelError("A pixel buffer of \(width) x \(height) cannot be made (error \(status)).")
        }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer {
            CVPixelBufferUnlockBaseAddress(buffer, [])
        }
        // Blue, green, red, unused in memory: a 32-bit little-endian word with the unused byte first.
        let layout = CGBitmapInfo.byteOrder32Little.rawValue | CGImageAlphaInfo.noneSkipFirst.rawValue
        guard
            let context = CGContext(
                data: CVPixelBufferGetBaseAddress(buffer),
                width: width,
                height: height,
                bitsPerComponent: 8,
                bytesPerRow: CVPixelBufferGetBytesPerRow(buffer),
                space: space,
                bitmapInfo: layout
            )
        else {
            throw ModelError("A drawing context of \(width) x \(height) cannot be made.")
        }
        draw(context)
        return buffer
    }
}
