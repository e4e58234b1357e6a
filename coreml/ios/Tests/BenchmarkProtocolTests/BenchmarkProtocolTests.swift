import BenchmarkProtocol
import Foundation
import XCTest

final class StatisticsTests: XCTestCase {
    func testMedianOfOddAndEvenCounts() throws {
        XCTAssertEqual(try XCTUnwrap(Statistics.median([3, 1, 2])), 2)
        XCTAssertEqual(try XCTUnwrap(Statistics.median([4, 1, 3, 2])), 2.5)
        XCTAssertEqual(try XCTUnwrap(Statistics.median([7])), 7)
    }

    func testPercentileInterpolatesLikeNumpy() throws {
        // numpy.percentile([1, 2, 3, 10], 90) is 7.9: position 2.7 between 3 and 10.
        XCTAssertEqual(try XCTUnwrap(Statistics.p90([10, 3, 2, 1])), 7.9, accuracy: 1e-12)
        let tens = (0...10).map { Double($0) }
        XCTAssertEqual(try XCTUnwrap(Statistics.p90(tens)), 9, accuracy: 1e-12)
        XCTAssertEqual(try XCTUnwrap(Statistics.percentile(0, of: tens)), 0)
        XCTAssertEqual(try XCTUnwrap(Statistics.percentile(1, of: tens)), 10)
    }

    func testNothingToDescribe() {
        XCTAssertNil(Statistics.mean([]))
        XCTAssertNil(Statistics.median([]))
        XCTAssertNil(Statistics.p90([]))
        XCTAssertNil(Statistics.trimmedMean([], trim: 1))
        XCTAssertNil(Statistics.trimmedMean(ofRounds: [], trim: 1))
    }

    func testTrimmedMeanDropsBothEnds() throws {
        XCTAssertEqual(try XCTUnwrap(Statistics.trimmedMean([100, 2, 4, 3, 0], trim: 1)), 3)
        XCTAssertEqual(try XCTUnwrap(Statistics.trimmedMean([1, 2, 9], trim: 0)), 4)
    }

    func testTrimThatWouldLeaveNothingIsReduced() throws {
        XCTAssertEqual(try XCTUnwrap(Statistics.trimmedMean([1, 2, 9], trim: 10)), 2)
        XCTAssertEqual(try XCTUnwrap(Statistics.trimmedMean([1, 2, 4, 9], trim: 10)), 3)
    }

    func testTrimmedMeanOfRoundsTrimsEachRoundByItself() throws {
        // The slow second round stays: it is not an outlier within itself.
        let rounds: [[Double]] = [[1, 1, 50], [3, 3, 3]]
        XCTAssertEqual(try XCTUnwrap(Statistics.trimmedMean(ofRounds: rounds, trim: 1)), 2)
    }
}

final class ScheduleTests: XCTestCase {
    private struct Failure: Error {}

    func testStandardIsThatOfModelBench() {
        XCTAssertEqual(Schedule.standard.rounds, 20)
        XCTAssertEqual(Schedule.standard.inferencesPerRound, 50)
        XCTAssertEqual(Schedule.standard.warmUpInferencesPerRound, 1)
        XCTAssertEqual(Schedule.standard.trimPerSide, 10)
    }

    func testRoundCountsOnlyTheInferencesAfterTheWarmUp() throws {
        let schedule = Schedule(
            rounds: 1, inferencesPerRound: 3, warmUpInferences: 0, warmUpInferencesPerRound: 2, trimPerSide: 1
        )
        var now = 0.0
        var inferences = 0
        var levels: [ThermalLevel] = [.fair, .nominal]
        let round = schedule.measureRound(
            clock: { now },
            thermalLevel: { levels.removeLast() },
            inference: {
                inferences += 1
                now += Double(inferences)
            }
        )
        XCTAssertEqual(inferences, 5)
        XCTAssertEqual(try XCTUnwrap(round.latenciesSeconds), [3, 4, 5])
        XCTAssertEqual(try XCTUnwrap(round.medianSeconds), 4)
        XCTAssertEqual(try XCTUnwrap(round.trimmedMeanSeconds), 4)
        XCTAssertEqual(round.thermalBefore, .nominal)
        XCTAssertEqual(round.thermalAfter, .fair)
    }

    func testErrorOfAnInferenceEndsTheRound() {
        XCTAssertThrowsError(
            try Schedule.standard.measureRound(
                clock: { 0 },
                thermalLevel: { .nominal },
                inference: { throw Failure() }
            )
        )
    }
}

final class ThermalLevelTests: XCTestCase {
    func testOrder() {
        XCTAssertEqual(ThermalLevel.allCases.sorted(), [.nominal, .fair, .serious, .critical])
    }

    func testThrottling() {
        XCTAssertEqual(ThermalLevel.allCases.filter { $0.isThrottling }, [.serious, .critical])
    }
}

final class GoldenTests: XCTestCase {
    private let text = """
        {"model": "X.mlpackage", "input": "image", "height": 224, "width": 224, "output": "logits",
         "tolerance": 0.02, "images": ["image0.png", "image1.png"], "logits": [[1, -4], [2.5, 0.5]]}
        """

    func testDecodes() throws {
        let golden = try Golden.decode(Data(text.utf8))
        XCTAssertEqual(golden.model, "X.mlpackage")
        XCTAssertEqual(golden.images, ["image0.png", "image1.png"])
        XCTAssertEqual(golden.logits, [[1, -4], [2.5, 0.5]])
        XCTAssertEqual(golden.tolerance, 0.02)
    }

    func testRejectsMissingRow() {
        let short = text.replacingOccurrences(of: ", [2.5, 0.5]", with: "")
        XCTAssertThrowsError(try Golden.decode(Data(short.utf8))) { error in
            XCTAssertTrue(error is GoldenError)
        }
    }

    func testRelativeErrorIsToTheGreatestExpectedLogit() throws {
        let error = try Golden.relativeError(expected: [1, -4], actual: [1.1, -4.2])
        XCTAssertEqual(try XCTUnwrap(error), 0.05, accuracy: 1e-12)
    }

    func testRelativeErrorOfValuesThatAreNotFinite() throws {
        XCTAssertNil(try Golden.relativeError(expected: [1, 2], actual: [1, .nan]))
        XCTAssertNil(try Golden.relativeError(expected: [1, 2], actual: [1, .infinity]))
        XCTAssertNil(try Golden.relativeError(expected: [0, 0], actual: [0, 0]))
        XCTAssertThrowsError(try Golden.relativeError(expected: [1, 2], actual: [1]))
    }

    func testCheckTakesTheWorstImage() throws {
        let golden = try Golden.decode(Data(text.utf8))
        let close = try golden.check([[1, -4], [2.5, 0.525]])
        XCTAssertTrue(close.passed)
        XCTAssertEqual(try XCTUnwrap(close.relativeError), 0.01, accuracy: 1e-12)
        XCTAssertFalse(try golden.check([[1, -4], [2.5, 0.8]]).passed)
        XCTAssertFalse(try golden.check([[1, .nan], [2.5, 0.5]]).passed)
        XCTAssertThrowsError(try golden.check([[1, -4]]))
    }
}

final class ResultsTests: XCTestCase {
    private let battery = BatteryReading(level: 0.5, state: "unplugged")

    private func makeRound(_ latencies: [Double], after: ThermalLevel = .nominal) -> Round {
        return Round(latenciesSeconds: latencies, trimPerSide: 1, thermalBefore: .nominal, thermalAfter: after)
    }

    private func makeResult(_ rounds: [Round], error: String? = nil) -> ComputeUnitResult {
        return ComputeUnitResult(
            computeUnits: "all",
            error: error,
            loadSeconds: 0.5,
            golden: GoldenResult(images: 1, relativeError: 0.001, tolerance: 0.02, passed: true),
            rounds: rounds,
            trimPerSide: 1,
            batteryBefore: battery,
            batteryAfter: battery
        )
    }

    private func makeReport(_ result: ComputeUnitResult) -> BenchmarkReport {
        return BenchmarkReport(
            startedAt: "2026-01-01T00:00:00Z",
            device: DeviceDescription(
                machine: "iPhone14,5", systemName: "iOS", systemVersion: "17.0", lowPowerMode: false
            ),
            schedule: .standard,
            models: [ModelResult(model: "X.mlpackage", error: nil, compileSeconds: 1.5, results: [result])]
        )
    }

    func testMeasuredResultHasASummary() throws {
        let result = makeResult([makeRound([0.001, 0.002, 0.003]), makeRound([0.002, 0.004, 0.006], after: .fair)])
        XCTAssertEqual(result.status, .measured)
        let summary = try XCTUnwrap(result.summary)
        XCTAssertEqual(summary.medianSeconds, 0.0025, accuracy: 1e-12)
        XCTAssertEqual(summary.p90Seconds, 0.005, accuracy: 1e-12)
        XCTAssertEqual(summary.trimmedMeanSeconds, 0.003, accuracy: 1e-12)
        XCTAssertEqual(summary.minimumSeconds, 0.001)
        XCTAssertEqual(summary.maximumSeconds, 0.006)
        XCTAssertEqual(summary.inferences, 6)
    }

    func testHotRoundForbidsASummary() {
        let result = makeResult([makeRound([0.001]), makeRound([0.002], after: .serious)])
        XCTAssertEqual(result.status, .throttled)
        XCTAssertNil(result.summary)
        XCTAssertEqual(result.rounds.count, 2)
    }

    func testErrorMakesTheResultFailed() {
        XCTAssertEqual(makeResult([makeRound([0.001])], error: "out of memory").status, .failed)
        XCTAssertEqual(makeResult([]).status, .failed)
        XCTAssertNil(makeResult([makeRound([0.001])], error: "out of memory").summary)
    }

    func testReportSurvivesJSON() throws {
        let report = makeReport(makeResult([makeRound([0.25, 0.5])]))
        XCTAssertEqual(try BenchmarkReport.decode(report.encoded(indented: true)), report)
        XCTAssertEqual(try BenchmarkReport.decode(report.encoded(indented: false)), report)
    }

    func testJSONIsOneLineWithSnakeCaseKeys() throws {
        let report = makeReport(makeResult([makeRound([0.25, 0.5])]))
        let data = try report.encoded(indented: false)
        let line = try XCTUnwrap(String(data: data, encoding: .utf8))
        XCTAssertFalse(line.contains("\n"))
        for key in ["format_version", "p90_seconds", "trimmed_mean_seconds", "thermal_before", "low_power_mode"] {
            XCTAssertTrue(line.contains("\"\(key)\""), key)
        }
    }

    func testReportWithoutSamplesKeepsTheRest() throws {
        let report = makeReport(makeResult([makeRound([0.25, 0.5])]))
        let short = report.withoutSamples()
        let round = try XCTUnwrap(short.models.first?.results.first?.rounds.first)
        XCTAssertNil(round.latenciesSeconds)
        XCTAssertEqual(try XCTUnwrap(round.medianSeconds), 0.375)
        XCTAssertEqual(short.models.first?.results.first?.summary, report.models.first?.results.first?.summary)
        XCTAssertEqual(short.startedAt, report.startedAt)
    }
}
