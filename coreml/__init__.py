"""Core ML for iPhones: export, verification without a Mac, compression, and a report on the Neural Engine."""
