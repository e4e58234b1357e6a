// swift-tools-version:5.5
import PackageDescription

// The parts of the benchmark that need no Apple framework; `swift test` runs them on macOS and Linux.
let package = Package(
    name: "BenchmarkProtocol",
    products: [
        .library(name: "BenchmarkProtocol", targets: ["BenchmarkProtocol"])
    ],
    targets: [
        .target(name: "BenchmarkProtocol"),
        .testTarget(name: "BenchmarkProtocolTests", dependencies: ["BenchmarkProtocol"]),
    ]
)
