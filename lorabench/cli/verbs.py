"""The words of the command line."""

VERBS = {
    "init": "write a first data config and experiment config for a data file",
    "train": "train one run, or a sweep with -m",
    "plan": "show and check what train would do; trains nothing",
    "fetch": "download what train needs from the Hub, for a machine without a network",
    "work": "train and score every pack of a sweep folder that is left",
    "evaluate": "score the saved adapters of a sweep again; trains nothing",
    "runs": "list every run of a sweep and its status",
    "compare": "what a sweep has found, in sentences, and its table: one row per setting",
    "report": "one page of a sweep that opens anywhere: verdicts, curves, examples, runs",
    "watch": "the same page, written again every ten seconds while the sweep runs",
    "settle": "add seeds to a sweep until its questions are settled, at looks fixed before",
    "sync": "send W&B runs that were written offline to the server",
    "generate": "what the base and every setting of a sweep answer to a prompt, side by side",
    "export": "a run's adapter, or base and adapter merged, checked against the run",
    "replay": "train a run again from its record alone; --verify says whether it is the same",
    "diff": "what differs between two runs: config, data, stack, losses, results",
    "completion": "what a shell needs to complete verbs, options and keys: bash, zsh or fish",
}
COMPOSING = ("train", "plan", "fetch")  # verbs whose words are composed by Hydra
EXAMPLES = """\
examples:
  lorabench init train.jsonl                        conf/data and conf/experiment for a file
  lorabench train                                   one run on the embedded base, seconds
  lorabench train -m head=exclude,lora lora.r=16,32 four runs
  lorabench compare outputs/default                 what they say, and their table
  lorabench replay outputs/default/ID --verify      one of them again: the same bits?
  lorabench evaluate outputs/default 'data.metric=[nll,nll_per_token]'   scored again
  lorabench report outputs/default                  one page: verdicts, curves, examples
  lorabench plan -m experiment=lm_head              what a sweep will do
  lorabench plan --smoke -m experiment=lm_head      and a few steps of each pack, reloaded
  lorabench generate outputs/default --prompt 'TEXT' base and settings, side by side
  lorabench export outputs/default/ID --to merged D a transformers folder, checked
  lorabench train --cfg job                         every key and its value
"""
EXIT_CODES = """\
exit codes:
  0      done
  1      a run failed, diverged, or is not what was asked for
  2      refused; nothing was changed. --json: as JSON on stdout
  128+n  ended by signal n (130: Ctrl-C); the same command continues
"""
