import Foundation

/// One round. The statistics repeat what is in the latencies, so that a report without samples still shows the rounds.
public struct Round: Codable, Equatable, Sendable {
    /// In the order measured; nil in a report without samples.
    public let latenciesSeconds: [Double]?
    public let medianSeconds: Double?
    public let trimmedMeanSeconds: Double?
    public let thermalBefore: ThermalLevel
    public let thermalAfter: ThermalLevel

    public init(
        latenciesSeconds: [Double],
        trimPerSide: Int,
        thermalBefore: ThermalLevel,
        thermalAfter: ThermalLevel
    ) {
        self.init(
            latenciesSeconds: latenciesSeconds,
            medianSeconds: Statistics.median(latenciesSeconds),
            trimmedMeanSeconds: Statistics.trimmedMean(latenciesSeconds, trim: trimPerSide),
            thermalBefore: thermalBefore,
            thermalAfter: thermalAfter
        )
    }

    private init(
        latenciesSeconds: [Double]?,
        medianSeconds: Double?,
        trimmedMeanSeconds: Double?,
        thermalBefore: ThermalLevel,
        thermalAfter: ThermalLevel
    ) {
        self.latenciesSeconds = latenciesSeconds
        self.medianSeconds = medianSeconds
        self.trimmedMeanSeconds = trimmedMeanSeconds
        self.thermalBefore = thermalBefore
        self.thermalAfter = thermalAfter
    }

    /// Whether the device was at a throttling level at either end of the round.
    public var wasThrottled: Bool {
        return thermalBefore.isThrottling || thermalAfter.isThrottling
    }

    /// The same round, its samples left out.
    public func withoutSamples() -> Round {
        return Round(
            latenciesSeconds: nil,
            medianSeconds: medianSeconds,
            trimmedMeanSeconds: trimmedMeanSeconds,
            thermalBefore: thermalBefore,
            thermalAfter: thermalAfter
        )
    }
}

/// The latency of one inference, in seconds.
public struct LatencySummary: Codable, Equatable, Sendable {
    /// Over the inferences of all rounds together.
    public let medianSeconds: Double
    /// Likewise, see `Statistics.percentile(_:of:)`.
    public let p90Seconds: Double
    /// ModelBench's average, see `Schedule`.
    public let trimmedMeanSeconds: Double
    public let minimumSeconds: Double
    public let maximumSeconds: Double
    /// How many inferences the median is taken over.
    public let inferences: Int

    /// Describes the rounds; nil if they hold no sample.
    public init?(rounds: [Round], trimPerSide: Int) {
        let samples = rounds.compactMap { $0.latenciesSeconds }
        let all = samples.flatMap { $0 }
        guard
            let median = Statistics.median(all),
            let p90 = Statistics.p90(all),
            let trimmedMean = Statistics.trimmedMean(ofRounds: samples, trim: trimPerSide),
            let minimum = all.min(),
            let maximum = all.max()
        else {
            return nil
        }
        self.medianSeconds = median
        self.p90Seconds = p90
        self.trimmedMeanSeconds = trimmedMean
        self.minimumSeconds = minimum
        self.maximumSeconds = maximum
        self.inferences = all.count
    }
}

/// Charge and power supply.
public struct BatteryReading: Codable, Equatable, Sendable {
    /// From 0 to 1; nil if the system does not tell.
    public let level: Double?
    /// "unplugged", "charging", "full" or "unknown".
    public let state: String

    public init(level: Double?, state: String) {
        self.level = level
        self.state = state
    }
}

/// What became of one model with one choice of compute units.
public enum Status: String, Codable, Sendable {
    /// All rounds ran below the throttling thermal levels; there is a summary.
    case measured
    /// The thermal level was serious or critical before or after a round; the rounds are kept, there is no summary.
    case throttled
    /// An error ended it; the error is kept, there is no summary.
    case failed
}

/// One model with one choice of compute units.
public struct ComputeUnitResult: Codable, Equatable, Sendable {
    /// "all", "cpuAndGPU", "cpuOnly" or "cpuAndNeuralEngine", as in MLComputeUnits.
    public let computeUnits: String
    public let status: Status
    public let error: String?
    /// Loading the compiled model, with its preparation for the chosen units where the system has none stored.
    public let loadSeconds: Double?
    /// Nil if there is no golden folder or the check was not reached.
    public let golden: GoldenResult?
    public let summary: LatencySummary?
    public let rounds: [Round]
    public let batteryBefore: BatteryReading
    public let batteryAfter: BatteryReading

    /// Decides the status from what was measured.
    ///
    /// - Parameter error: what ended the measurement early, else nil.
    public init(
        computeUnits: String,
        error: String?,
        loadSeconds: Double?,
        golden: GoldenResult?,
        rounds: [Round],
        trimPerSide: Int,
        batteryBefore: BatteryReading,
        batteryAfter: BatteryReading
    ) {
        let status: Status
        var summary: LatencySummary?
        if error != nil || rounds.isEmpty {
            status = .failed
        } else if rounds.contains(where: { $0.wasThrottled }) {
            status = .throttled
        } else {
            status = .measured
            summary = LatencySummary(rounds: rounds, trimPerSide: trimPerSide)
        }
        self.init(
            computeUnits: computeUnits,
            status: status,
            error: error,
            loadSeconds: loadSeconds,
            golden: golden,
            summary: summary,
            rounds: rounds,
            batteryBefore: batteryBefore,
            batteryAfter: batteryAfter
        )
    }

    private init(
        computeUnits: String,
        status: Status,
        error: String?,
        loadSeconds: Double?,
        golden: GoldenResult?,
        summary: LatencySummary?,
        rounds: [Round],
        batteryBefore: BatteryReading,
        batteryAfter: BatteryReading
    ) {
        self.computeUnits = computeUnits
        self.status = status
        self.error = error
        self.loadSeconds = loadSeconds
        self.golden = golden
        self.summary = summary
        self.rounds = rounds
        self.batteryBefore = batteryBefore
        self.batteryAfter = batteryAfter
    }

    /// The same result, the samples of its rounds left out.
    public func withoutSamples() -> ComputeUnitResult {
        return ComputeUnitResult(
            computeUnits: computeUnits,
            status: status,
            error: error,
            loadSeconds: loadSeconds,
            golden: golden,
            summary: summary,
            rounds: rounds.map { $0.withoutSamples() },
            batteryBefore: batteryBefore,
            batteryAfter: batteryAfter
        )
    }
}

/// One model with every choice of compute units.
public struct ModelResult: Codable, Equatable, Sendable {
    /// File name of the package or the compiled model.
    public let model: String
    /// Why the model could not be compiled or its golden folder read, else nil.
    public let error: String?
    /// Compiling the package on the device; nil for a model that came compiled.
    public let compileSeconds: Double?
    public let results: [ComputeUnitResult]

    public init(model: String, error: String?, compileSeconds: Double?, results: [ComputeUnitResult]) {
        self.model = model
        self.error = error
        self.compileSeconds = compileSeconds
        self.results = results
    }
}

/// The device that ran the benchmark.
public struct DeviceDescription: Codable, Equatable, Sendable {
    /// Apple's identifier of the hardware, such as "iPhone14,5".
    public let machine: String
    public let systemName: String
    public let systemVersion: String
    /// Low Power Mode slows the processors without changing the thermal state.
    public let lowPowerMode: Bool

    public init(machine: String, systemName: String, systemVersion: String, lowPowerMode: Bool) {
        self.machine = machine
        self.systemName = systemName
        self.systemVersion = systemVersion
        self.lowPowerMode = lowPowerMode
    }
}

/// Everything that one run of the app found.
public struct BenchmarkReport: Codable, Equatable, Sendable {
    /// Raised when a field changes its meaning.
    public let formatVersion: Int
    /// ISO 8601, in UTC.
    public let startedAt: String
    public let device: DeviceDescription
    public let schedule: Schedule
    public let models: [ModelResult]

    public init(startedAt: String, device: DeviceDescription, schedule: Schedule, models: [ModelResult]) {
        self.formatVersion = 1
        self.startedAt = startedAt
        self.device = device
        self.schedule = schedule
        self.models = models
    }

    private init(copying report: BenchmarkReport, models: [ModelResult]) {
        self.formatVersion = report.formatVersion
        self.startedAt = report.startedAt
        self.device = report.device
        self.schedule = report.schedule
        self.models = models
    }

    /// The same report, the samples of all rounds left out: short enough for one line of a console.
    public func withoutSamples() -> BenchmarkReport {
        let shortened = models.map { model in
            ModelResult(
                model: model.model,
                error: model.error,
                compileSeconds: model.compileSeconds,
                results: model.results.map { $0.withoutSamples() }
            )
        }
        return BenchmarkReport(copying: self, models: shortened)
    }

    /// JSON with sorted keys in snake case; a field that is nil is left out.
    ///
    /// - Parameter indented: false gives one line.
    public func encoded(indented: Bool) throws -> Data {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = indented ? [.sortedKeys, .prettyPrinted] : [.sortedKeys]
        return try encoder.encode(self)
    }

    /// Reads what `encoded(indented:)` wrote.
    public static func decode(_ data: Data) throws -> BenchmarkReport {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        return try decoder.decode(BenchmarkReport.self, from: data)
    }
}
