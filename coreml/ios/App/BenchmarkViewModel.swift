import SwiftUI
import UIKit

/// One finished result as the list shows it.
struct ResultLine: Identifiable {
    let id = UUID()
    let title: String
    let detail: String
}

/// Runs the engine off the main thread and holds what the list shows.
@MainActor
final class BenchmarkViewModel: ObservableObject {
    @Published private(set) var lines: [ResultLine] = []
    @Published private(set) var progress = "Keep the app in the foreground, unplugged or fully charged, out of the sun."
    @Published private(set) var isRunning = false

    /// Measures every model that is found; does nothing while a run is under way.
    ///
    /// - Parameter exitWhenDone: prints the report as one line of JSON and ends the process, for run.sh.
    func start(exitWhenDone: Bool) {
        if isRunning {
            return
        }
        isRunning = true
        lines = []
        UIApplication.shared.isIdleTimerDisabled = true  // the processors slow down when the screen locks
        let engine = BenchmarkEngine()
        let device = DeviceState.describe()
        Task.detached(priority: .userInitiated) {
            let report = await engine.run(device: device) { event in
                await self.show(event)
            }
            await self.finish(report, exitWhenDone: exitWhenDone)
        }
    }

    private func show(_ event: BenchmarkEvent) {
        switch event {
        case .progress(let text):
            progress = text
        case .finished(let model, let result):
            lines.append(ResultLine(title: "\(model), \(result.computeUnits)", detail: describe(result)))
        case .unusable(let model, let error):
            lines.append(ResultLine(title: model, detail: "cannot be used: \(error)"))
        }
    }

    private func finish(_ report: BenchmarkReport, exitWhenDone: Bool) {
        isRunning = false
        UIApplication.shared.isIdleTimerDisabled = false
        var failed = report.models.isEmpty
        do {
            let url = try save(report)
            progress = report.models.isEmpty
                ? "There is no model: use run.sh, or put packages into the app's folder with the Finder."
                : "Written to \(url.lastPathComponent) in the app's folder."
        } catch {
            progress = "The report cannot be written: \(error.localizedDescription)"
            failed = true
        }
        if exitWhenDone {
            failed = !printLine(report) || failed
            exit(failed ? 1 : 0)
        }
    }

    /// Writes the whole report, samples included, to the Documents folder.
    private func save(_ report: BenchmarkReport) throws -> URL {
        let time = report.startedAt.replacingOccurrences(of: ":", with: "")
        let url = try ModelLocator.documents().appendingPathComponent("results-\(time).json")
        try report.encoded(indented: true).write(to: url, options: .atomic)
        return url
    }

    /// Prints the report without samples; false if it cannot be encoded.
    private func printLine(_ report: BenchmarkReport) -> Bool {
        guard let json = try? report.withoutSamples().encoded(indented: false) else {
            return false
        }
        // Not print(): its buffer may be lost when the process ends.
        FileHandle.standardOutput.write(Data("RESULT_JSON: ".utf8) + json + Data("\n".utf8))
        return true
    }

    private func describe(_ result: ComputeUnitResult) -> String {
        var parts: [String] = []
        switch result.status {
        case .measured:
            if let summary = result.summary {
                parts.append("median \(milliseconds(summary.medianSeconds)), p90 \(milliseconds(summary.p90Seconds))")
                parts.append("trimmed mean \(milliseconds(summary.trimmedMeanSeconds))")
            }
        case .throttled:
            parts.append("throttled: the device was too hot for a median")
        case .failed:
            parts.append("failed: \(result.error ?? "no round was measured")")
        }
        if let load = result.loadSeconds {
            parts.append("load \(milliseconds(load))")
        }
        if let golden = result.golden {
            let error = golden.relativeError.map { String(format: "%.2g", $0) } ?? "not finite"
            parts.append(golden.passed ? "output correct (\(error))" : "OUTPUT WRONG (\(error))")
        } else {
            parts.append("output not checked")
        }
        return parts.joined(separator: "; ")
    }

    private func milliseconds(_ seconds: Double) -> String {
        return String(format: "%.3f ms", seconds * 1000)
    }
}
