import Foundation
import UIKit

/// What the system tells about the device.
enum DeviceState {
    /// A steady clock, in seconds.
    static func clock() -> Double {
        return Double(DispatchTime.now().uptimeNanoseconds) * 1e-9
    }

    /// The thermal state now.
    static func thermalLevel() -> ThermalLevel {
        switch ProcessInfo.processInfo.thermalState {
        case .nominal: return .nominal
        case .fair: return .fair
        case .serious: return .serious
        case .critical: return .critical
        @unknown default: return .critical  // a state that nobody knows must not count as cool
        }
    }

    /// Charge and power supply now.
    @MainActor
    static func battery() -> BatteryReading {
        let device = UIDevice.current
        device.isBatteryMonitoringEnabled = true
        let level = device.batteryLevel  // -1 if unknown
        let state: String
        switch device.batteryState {
        case .unplugged: state = "unplugged"
        case .charging: state = "charging"
        case .full: state = "full"
        case .unknown: state = "unknown"
        @unknown default: state = "unknown"
        }
        return BatteryReading(level: level < 0 ? nil : Double(level), state: state)
    }

    /// Hardware and system.
    @MainActor
    static func describe() -> DeviceDescription {
        return DeviceDescription(
            machine: machine(),
            systemName: UIDevice.current.systemName,
            systemVersion: UIDevice.current.systemVersion,
            lowPowerMode: ProcessInfo.processInfo.isLowPowerModeEnabled
        )
    }

    private static func machine() -> String {
        var information = utsname()
        uname(&information)
        return withUnsafeBytes(of: information.machine) { bytes in
            String(decoding: bytes.prefix(while: { $0 != 0 }), as: UTF8.self)
        }
    }
}
