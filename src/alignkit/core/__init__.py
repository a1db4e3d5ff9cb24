"""What every stage stands on: row types, configuration, run folders, the journal and the command line."""
