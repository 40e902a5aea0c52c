"""From result files to the pages of measurements."""
