import SwiftUI

@main
struct MobiAttBenchmarkApp: App {
    @StateObject private var viewModel = BenchmarkViewModel()

    var body: some Scene {
        WindowGroup {
            ContentView(viewModel: viewModel)
                .onAppear {
                    if ProcessInfo.processInfo.arguments.contains("--autorun") {
                        viewModel.start(exitWhenDone: true)
                    }
                }
        }
    }
}
