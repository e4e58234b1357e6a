import Foundation

/// How many inferences are made, and which of them count.
///
/// The numbers are those of Apple's ModelBench (github.com/apple/ml-mobileone, commit b7f4e6d, in the folder
/// ModelBench: ModelBench/ViewController.swift and README.md): 20 rounds of 50 inferences; before each round 1
/// inference that is not counted; of each round the 10 fastest and the 10 slowest inferences are dropped, the other 30
/// averaged, and the rounds' averages averaged. ModelBench loads the model anew in every round; here it is loaded once
/// and warmed up before the first round, because preparing a transformer for the Neural Engine may take longer than
/// the whole benchmark.
public struct Schedule: Codable, Equatable, Sendable {
    public let rounds: Int
    public let inferencesPerRound: Int
    /// Inferences before the first round that are not counted.
    public let warmUpInferences: Int
    /// Inferences at the start of every round that are not counted.
    public let warmUpInferencesPerRound: Int
    /// Inferences that the trimmed mean drops at each end of a round.
    public let trimPerSide: Int

    public init(
        rounds: Int,
        inferencesPerRound: Int,
        warmUpInferences: Int,
        warmUpInferencesPerRound: Int,
        trimPerSide: Int
    ) {
        precondition(rounds > 0 && inferencesPerRound > 0, "a schedule has at least one round of one inference")
        precondition(
            warmUpInferences >= 0 && warmUpInferencesPerRound >= 0 && trimPerSide >= 0,
            "the counts of a schedule are not negative"
        )
        self.rounds = rounds
        self.inferencesPerRound = inferencesPerRound
        self.warmUpInferences = warmUpInferences
        self.warmUpInferencesPerRound = warmUpInferencesPerRound
        self.trimPerSide = trimPerSide
    }

    /// The schedule of every published number.
    public static let standard = Schedule(
        rounds: 20,
        inferencesPerRound: 50,
        warmUpInferences: 10,
        warmUpInferencesPerRound: 1,
        trimPerSide: 10
    )

    /// Makes the inferences of one round.
    ///
    /// - Parameters:
    ///   - clock: a steady clock in seconds.
    ///   - thermalLevel: read once before the first inference and once after the last.
    ///   - inference: one inference; an error ends the round.
    public func measureRound(
        clock: () -> Double,
        thermalLevel: () -> ThermalLevel,
        inference: () throws -> Void
    ) rethrows -> Round {
        let before = thermalLevel()
        for _ in 0..<warmUpInferencesPerRound {
            try inference()
        }
        var latencies: [Double] = []
        latencies.reserveCapacity(inferencesPerRound)
        for _ in 0..<inferencesPerRound {
            let start = clock()
            try inference()
            latencies.append(clock() - start)
        }
        return Round(
            latenciesSeconds: latencies,
            trimPerSide: trimPerSide,
            thermalBefore: before,
            thermalAfter: thermalLevel()
        )
    }
}
