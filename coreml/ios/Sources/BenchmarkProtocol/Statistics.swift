import Foundation

/// Statistics of durations. Every function returns nil where there is nothing to describe.
public enum Statistics {
    /// The arithmetic mean.
    public static func mean(_ values: [Double]) -> Double? {
        if values.isEmpty {
            return nil
        }
        return values.reduce(0, +) / Double(values.count)
    }

    /// The middle value, or the mean of the two middle values of an even count.
    public static func median(_ values: [Double]) -> Double? {
        return percentile(0.5, of: values)
    }

    /// The 90th percentile, see `percentile(_:of:)`.
    public static func p90(_ values: [Double]) -> Double? {
        return percentile(0.9, of: values)
    }

    /// A percentile by linear interpolation: of n sorted values, the one at position fraction * (n - 1), counted from
    /// 0, and between two positions the weighted mean of both. It is the default of numpy.percentile, which the
    /// project's other benchmarks use.
    ///
    /// - Parameter fraction: from 0, the least value, to 1, the greatest.
    public static func percentile(_ fraction: Double, of values: [Double]) -> Double? {
        precondition(fraction >= 0 && fraction <= 1, "a percentile's fraction lies from 0 to 1")
        if values.isEmpty {
            return nil
        }
        let sorted = values.sorted()
        let position = fraction * Double(sorted.count - 1)
        let lower = Int(position.rounded(.down))
        let upper = min(lower + 1, sorted.count - 1)
        let weight = position - Double(lower)
        return sorted[lower] + weight * (sorted[upper] - sorted[lower])
    }

    /// The mean without the `trim` least and the `trim` greatest values.
    ///
    /// - Parameter trim: reduced to (count - 1) / 2 where it would leave nothing, as ModelBench does.
    public static func trimmedMean(_ values: [Double], trim: Int) -> Double? {
        precondition(trim >= 0, "trim counts values")
        if values.isEmpty {
            return nil
        }
        let allowed = min(trim, (values.count - 1) / 2)
        let sorted = values.sorted()
        return mean(Array(sorted[allowed..<(sorted.count - allowed)]))
    }

    /// The mean over rounds of each round's trimmed mean: the average that ModelBench shows.
    public static func trimmedMean(ofRounds rounds: [[Double]], trim: Int) -> Double? {
        return mean(rounds.compactMap { trimmedMean($0, trim: trim) })
    }
}
