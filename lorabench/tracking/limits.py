"""How long trackers may take, in seconds; tests set other values."""

INIT_SECONDS = 20.0  # for the W&B server to answer when a run starts
FINISH_SECONDS = 30.0  # for all runs of a pack to write or send their last rows
INTERRUPTED_SECONDS = 5.0  # the same after a signal: Docker kills 10 s after SIGTERM, Slurm 30 s
CLIENT_SECONDS = 5.0  # for a client to close its files when it gives up or ends
ADAPTER_SECONDS = 5.0  # for an adapter to be handed to W&B, once everything else is ready to end
REWRITE_SECONDS = 20.0  # to write runs again that a client lost
QUEUED_ROWS = 10_000  # per run, while the W&B client does not take them
SYNC_SECONDS = 600.0  # for the rows of one run that `lorabench sync` sends
