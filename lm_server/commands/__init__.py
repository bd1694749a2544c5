"""The subcommands of `lm-server`, one module each: add_arguments(parser) and run(args)."""
