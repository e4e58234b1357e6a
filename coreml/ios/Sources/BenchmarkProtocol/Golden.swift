import Foundation

/// What golden.json beside a package holds: images and the logits that the model must give for them.
public struct Golden: Codable, Equatable, Sendable {
    public let model: String
    /// Name of the model's image input.
    public let input: String
    public let height: Int
    public let width: Int
    /// Name of the model's output, a multi array of shape [1, classes].
    public let output: String
    /// The greatest allowed `relativeError`.
    public let tolerance: Double
    /// File names in the same folder, RGB PNG files of exactly height x width pixels.
    public let images: [String]
    /// The expected logits, one row for each image.
    public let logits: [[Double]]

    public init(
        model: String,
        input: String,
        height: Int,
        width: Int,
        output: String,
        tolerance: Double,
        images: [String],
        logits: [[Double]]
    ) {
        self.model = model
        self.input = input
        self.height = height
        self.width = width
        self.output = output
        self.tolerance = tolerance
        self.images = images
        self.logits = logits
    }

    /// Reads golden.json.
    ///
    /// - Throws: `GoldenError` if its parts do not belong together, else what JSONDecoder throws.
    public static func decode(_ data: Data) throws -> Golden {
        let golden = try JSONDecoder().decode(Golden.self, from: data)
        if golden.images.isEmpty || golden.images.count != golden.logits.count {
            throw GoldenError(
                "golden.json names \(golden.images.count) images and \(golden.logits.count) rows of logits;"
                    + " it needs one row for each image and at least one."
            )
        }
        if golden.height < 1 || golden.width < 1 || golden.tolerance <= 0 {
            throw GoldenError("golden.json needs a positive height, width and tolerance.")
        }
        return golden
    }

    /// max |actual - expected| / max |expected| of one image's logits; nil if a value is not finite or all are zero.
    ///
    /// - Throws: `GoldenError` if the counts differ.
    public static func relativeError(expected: [Double], actual: [Double]) throws -> Double? {
        if expected.count != actual.count || expected.isEmpty {
            throw GoldenError("The model gives \(actual.count) logits, golden.json has \(expected.count).")
        }
        var difference = 0.0
        var scale = 0.0
        for (wanted, given) in zip(expected, actual) {
            if !wanted.isFinite || !given.isFinite {
                return nil
            }
            difference = max(difference, abs(given - wanted))
            scale = max(scale, abs(wanted))
        }
        return scale > 0 ? difference / scale : nil
    }

    /// Compares the logits of all images; the result has the greatest error.
    ///
    /// - Throws: `GoldenError` if the counts differ.
    public func check(_ actual: [[Double]]) throws -> GoldenResult {
        if actual.count != logits.count {
            throw GoldenError("There are outputs for \(actual.count) images, golden.json has \(logits.count).")
        }
        var worst = 0.0
        for (expectedRow, actualRow) in zip(logits, actual) {
            guard let error = try Golden.relativeError(expected: expectedRow, actual: actualRow) else {
                return GoldenResult(images: logits.count, relativeError: nil, tolerance: tolerance, passed: false)
            }
            worst = max(worst, error)
        }
        return GoldenResult(
            images: logits.count,
            relativeError: worst,
            tolerance: tolerance,
            passed: worst <= tolerance
        )
    }
}

/// The outcome of the numerical check.
public struct GoldenResult: Codable, Equatable, Sendable {
    public let images: Int
    /// The greatest over the images; nil if an output was not finite.
    public let relativeError: Double?
    public let tolerance: Double
    public let passed: Bool

    public init(images: Int, relativeError: Double?, tolerance: Double, passed: Bool) {
        self.images = images
        self.relativeError = relativeError
        self.tolerance = tolerance
        self.passed = passed
    }
}

/// Golden data that do not fit together, or do not fit the model.
public struct GoldenError: LocalizedError, Equatable {
    public let message: String

    public init(_ message: String) {
        self.message = message
    }

    public var errorDescription: String? {
        return message
    }
}
