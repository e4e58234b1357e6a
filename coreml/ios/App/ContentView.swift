import SwiftUI

/// A button, the progress, and one line for each finished choice of compute units.
struct ContentView: View {
    @ObservedObject var viewModel: BenchmarkViewModel

    var body: some View {
        List {
            Section {
                Button("Run the benchmark") {
                    viewModel.start(exitWhenDone: false)
                }
                .disabled(viewModel.isRunning)
                if viewModel.isRunning {
                    ProgressView()
                }
                Text(viewModel.progress)
                    .font(.footnote)
            }
            Section {
                ForEach(viewModel.lines) { line in
                    VStack(alignment: .leading) {
                        Text(line.title)
                            .font(.headline)
                        Text(line.detail)
                            .font(.footnote)
                    }
                }
            }
        }
    }
}
