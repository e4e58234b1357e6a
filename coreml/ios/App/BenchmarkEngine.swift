import CoreML
import Foundation

/// What the engine tells while it works.
enum BenchmarkEvent: Sendable {
    case progress(String)
    case finished(model: String, result: ComputeUnitResult)
    case unusable(model: String, error: String)
}

/// A choice of compute units and the name it has in the report.
struct ComputeUnitChoice {
    let name: String
    let units: MLComputeUnits

    /// All that this version of iOS has.
    static var available: [ComputeUnitChoice] {
        var choices = [
            ComputeUnitChoice(name: "all", units: .all),
            ComputeUnitChoice(name: "cpuAndGPU", units: .cpuAndGPU),
            ComputeUnitChoice(name: "cpuOnly", units: .cpuOnly),
        ]
        if #available(iOS 16.0, *) {
            choices.append(ComputeUnitChoice(name: "cpuAndNeuralEngine", units: .cpuAndNeuralEngine))
        }
        return choices
    }
}

/// Measures every model with every choice of compute units, one after the other.
struct BenchmarkEngine: Sendable {
    let schedule = Schedule.standard
    /// The longest wait, in seconds, for the device to cool down before a measurement begins.
    let longestCoolDown = 300

    /// Never throws: what fails is in the report.
    func run(
        device: DeviceDescription,
        update: @Sendable (BenchmarkEvent) async -> Void
    ) async -> BenchmarkReport {
        let startedAt = ISO8601DateFormatter().string(from: Date())
        var models: [ModelResult] = []
        for located in ModelLocator.find() {
            await update(.progress("\(located.name): compiling"))
            let prepared: PreparedModel
            do {
                prepared = try PreparedModel(located)
            } catch {
                let message = error.localizedDescription
                await update(.unusable(model: located.name, error: message))
                models.append(ModelResult(model: located.name, error: message, compileSeconds: nil, results: []))
                continue
            }
            var results: [ComputeUnitResult] = []
            for choice in ComputeUnitChoice.available {
                let result = await measure(prepared, choice: choice, update: update)
                results.append(result)
                await update(.finished(model: located.name, result: result))
            }
            prepared.removeTemporaryFiles()
            models.append(
                ModelResult(
                    model: located.name,
                    error: nil,
                    compileSeconds: prepared.compileSeconds,
                    results: results
                )
            )
        }
        return BenchmarkReport(startedAt: startedAt, device: device, schedule: schedule, models: models)
    }

    private func measure(
        _ prepared: PreparedModel,
        choice: ComputeUnitChoice,
        update: @Sendable (BenchmarkEvent) async -> Void
    ) async -> ComputeUnitResult {
        let title = "\(prepared.name), \(choice.name)"
        await coolDown(title: title, update: update)
        let batteryBefore = await DeviceState.battery()
        var failure: String?
        var loadSeconds: Double?
        var goldenResult: GoldenResult?
        var rounds: [Round] = []
        do {
            await update(.progress("\(title): loading"))
            let start = DeviceState.clock()
            let model = try LoadedModel(compiledURL: prepared.compiledURL, units: choice.units)
            loadSeconds = DeviceState.clock() - start

            await update(.progress("\(title): checking the output"))
            if let golden = prepared.golden {
                goldenResult = try model.check(golden)
            }

            let input = try model.benchmarkInput(golden: prepared.golden)
            await update(.progress("\(title): warming up"))
            for _ in 0..<schedule.warmUpInferences {
                try model.predict(input)
            }
            for number in 1...schedule.rounds {
                await update(.progress("\(title): round \(number) of \(schedule.rounds)"))
                let round = try schedule.measureRound(
                    clock: DeviceState.clock,
                    thermalLevel: DeviceState.thermalLevel,
                    inference: { try model.predict(input) }
                )
                rounds.append(round)
            }
        } catch {
            failure = error.localizedDescription
        }
        return ComputeUnitResult(
            computeUnits: choice.name,
            error: failure,
            loadSeconds: loadSeconds,
            golden: goldenResult,
            rounds: rounds,
            trimPerSide: schedule.trimPerSide,
            batteryBefore: batteryBefore,
            batteryAfter: await DeviceState.battery()
        )
    }

    /// Waits for the nominal level, since the measurement before may have heated the device, but not for ever.
    private func coolDown(title: String, update: @Sendable (BenchmarkEvent) async -> Void) async {
        var waited = 0
        while DeviceState.thermalLevel() > .nominal && waited < longestCoolDown {
            await update(.progress("\(title): waiting for the device to cool down"))
            try? await Task.sleep(nanoseconds: 5_000_000_000)
            waited += 5
        }
    }
}
