import Foundation

/// A model file and the golden folder beside it, if there is one.
struct LocatedModel {
    let url: URL
    let goldenFolder: URL?

    /// The file name.
    var name: String {
        return url.lastPathComponent
    }

    /// Whether the model must still be compiled.
    var isPackage: Bool {
        return url.pathExtension == "mlpackage"
    }
}

/// Finds models in the app's bundle and in its Documents folder.
enum ModelLocator {
    /// Every .mlpackage and .mlmodelc, sorted by name: first those of the bundle, then those of Documents.
    static func find() -> [LocatedModel] {
        var folders: [URL] = []
        if let resources = Bundle.main.resourceURL {
            folders.append(resources.appendingPathComponent("Models", isDirectory: true))
        }
        if let shared = try? documents() {
            folders.append(shared)
        }
        return folders.flatMap { models(in: $0) }
    }

    /// The folder that the Finder and the Files app show.
    static func documents() throws -> URL {
        return try FileManager.default.url(
            for: .documentDirectory,
            in: .userDomainMask,
            appropriateFor: nil,
            create: true
        )
    }

    private static func models(in folder: URL) -> [LocatedModel] {
        let entries = (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)) ?? []
        return entries
            .filter { ["mlpackage", "mlmodelc"].contains($0.pathExtension) }
            .sorted { $0.lastPathComponent < $1.lastPathComponent }
            .map { url -> LocatedModel in
                let golden = url.deletingPathExtension().appendingPathExtension("golden")
                let exists = FileManager.default.fileExists(atPath: golden.path)
                return LocatedModel(url: url, goldenFolder: exists ? golden : nil)
            }
    }
}
