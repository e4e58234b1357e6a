import CoreML
import CoreVideo
import Foundation

// Every call into Core ML stands in a function that is not async: inside one the compiler would choose Core ML's async
// variants, which need later versions of iOS and add their own scheduling to the latency.

/// A mistake in a model or in the files beside it.
struct ModelError: LocalizedError {
    let message: String

    init(_ message: String) {
        self.message = message
    }

    var errorDescription: String? {
        return message
    }
}

/// The golden data of a model, its images read into pixel buffers.
struct GoldenData {
    let golden: Golden
    let images: [CVPixelBuffer]

    /// Reads golden.json and the images it names.
    init(folder: URL) throws {
        let file = folder.appendingPathComponent("golden.json")
        guard let data = try? Data(contentsOf: file) else {
            throw ModelError("\(folder.lastPathComponent) has no golden.json.")
        }
        let golden = try Golden.decode(data)
        self.golden = golden
        self.images = try golden.images.map { name in
            try PixelBuffers.read(
                png: folder.appendingPathComponent(name),
                width: golden.width,
                height: golden.height
            )
        }
    }
}

/// A model compiled for this device, with its golden data.
struct PreparedModel {
    let name: String
    let compiledURL: URL
    /// Nil for a model that came compiled.
    let compileSeconds: Double?
    let golden: GoldenData?

    /// Compiles a package; a compiled model is taken as it is.
    init(_ located: LocatedModel) throws {
        name = located.name
        golden = try located.goldenFolder.map { try GoldenData(folder: $0) }
        if located.isPackage {
            let start = DeviceState.clock()
            compiledURL = try MLModel.compileModel(at: located.url)
            compileSeconds = DeviceState.clock() - start
        } else {
            compiledURL = located.url
            compileSeconds = nil
        }
    }

    /// Removes what the compilation wrote: it lies in a temporary folder that the system empties late.
    func removeTemporaryFiles() {
        if compileSeconds != nil {
            try? FileManager.default.removeItem(at: compiledURL)
        }
    }
}

/// A model loaded with one choice of compute units.
final class LoadedModel {
    private let model: MLModel
    private let inputName: String
    private let width: Int
    private let height: Int

    /// Loads a compiled model.
    ///
    /// - Throws: `ModelError` unless its only input is an image, else what Core ML throws.
    init(compiledURL: URL, units: MLComputeUnits) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let model = try MLModel(contentsOf: compiledURL, configuration: configuration)
        let inputs = model.modelDescription.inputDescriptionsByName
        guard inputs.count == 1, let input = inputs.first, let constraint = input.value.imageConstraint else {
            throw ModelError("The benchmark needs a model whose only input is an image.")
        }
        self.model = model
        self.inputName = input.key
        self.width = constraint.pixelsWide
        self.height = constraint.pixelsHigh
    }

    /// The input that is timed: the first golden image, or a grey one.
    func benchmarkInput(golden: GoldenData?) throws -> MLFeatureProvider {
        if let image = golden?.images.first {
            return try makeInput(image)
        }
        return try makeInput(PixelBuffers.grey(width: width, height: height))
    }

    /// Makes one inference and drops the output.
    func predict(_ input: MLFeatureProvider) throws {
        // Without its own pool a background thread keeps the outputs of all inferences.
        try autoreleasepool {
            _ = try model.prediction(from: input)
        }
    }

    /// Compares the outputs for the golden images with the expected logits.
    func check(_ data: GoldenData) throws -> GoldenResult {
        if data.golden.input != inputName {
            throw ModelError("The model's input is named \(inputName), golden.json says \(data.golden.input).")
        }
        let outputs = try data.images.map { try logits(of: $0, output: data.golden.output) }
        return try data.golden.check(outputs)
    }

    private func logits(of image: CVPixelBuffer, output: String) throws -> [Double] {
        return try autoreleasepool { () throws -> [Double] in
            let prediction = try model.prediction(from: makeInput(image))
            guard let array = prediction.featureValue(for: output)?.multiArrayValue else {
                throw ModelError("The model has no output \(output) that is a multi array.")
            }
            return (0..<array.count).map { array[$0].doubleValue }
        }
    }

    private func makeInput(_ image: CVPixelBuffer) throws -> MLFeatureProvider {
        return try MLDictionaryFeatureProvider(dictionary: [inputName: MLFeatureValue(pixelBuffer: image)])
    }
}
