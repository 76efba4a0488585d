"""What `velora-plan --help` says around its options."""

from velora_fx.cli.presets import PRESETS

DESCRIPTION = """\
Predict the peak memory of one training step, and plan which activations to compress so that it fits a budget.

Nothing is trained or downloaded besides a config: the model is made without its weights, so a laptop can plan for a
large GPU. The plan is the one that velora_fx.optimize would make for the same model, inputs and options."""

EPILOG = f"""\
models:
  a preset            {", ".join(PRESETS)}
  a config            config.json, a folder that holds one, or a hub id (owner/name)
  your own            package.module:factory; factory() runs under torch.device("meta") and returns a model, or
                      (model, example_inputs) as velora_fx.plan takes them; import it from the current folder

examples:
  What does a step of Llama 7B need, and how far can compression take it?
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd

  The same step within 56 GiB: what has to be compressed?
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd --budget-gb 56

  For scripts: one JSON object on stdout, and the answer as the exit code.
    velora-plan --model gpt2-xl --batch-size 8 --budget-gb 44 --json > plan.json

  A picture of the step, untouched and planned.
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd --budget-gb 56 --plot plan.svg

  Which card? A row for each size.
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd --sweep 40,48,56,64,80

  What would recompute alone reach, and what compression alone?
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd --budget-gb 40 --method exact
    velora-plan --model llama-7b --batch-size 4 --seq-len 2048 --optimizer sgd --budget-gb 56 --method compress

  How much faster with compression wherever it saves time?
    velora-plan --model llama-1b --batch-size 8 --objective speed

  Can all weights of Llama 7B be trained with AdamW on a card of 24 GiB? Save the plan, and apply it there.
    velora-plan --model llama-7b --seq-len 2048 --gradients factored --compiled --budget-gb 24 --save plan.json
    velora-plan --plan plan.json

  A model of your own, in float32 on CPU.
    velora-plan --model my_package.models:make_classifier --dtype float32 --device cpu --budget-gb 2

exit codes: 0 the step fits (or no budget was given), 1 no plan fits: the tightest one is printed, 2 bad input,
            3 an unexpected error, with its traceback"""
