"""``python -m lora_merge_cli`` is the console script."""

from lora_merge_cli._cli.app import main

main()
