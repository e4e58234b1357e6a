import Foundation

/// The states of ProcessInfo.ThermalState by name, from cool to hot.
public enum ThermalLevel: String, Codable, CaseIterable, Comparable, Sendable {
    case nominal
    case fair
    case serious
    case critical

    /// Whether the system slows the processors at this level, so that a latency says nothing about the model.
    public var isThrottling: Bool {
        return self >= .serious
    }

    public static func < (left: ThermalLevel, right: ThermalLevel) -> Bool {
        return left.rank < right.rank
    }

    private var rank: Int {
        switch self {
        case .nominal: return 0
        case .fair: return 1
        case .serious: return 2
        case .critical: return 3
        }
    }
}
