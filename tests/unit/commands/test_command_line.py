"""Options that several commands have arrive where they are used."""

import argparse
from dataclasses import asdict

from megatron_tgdpo.data.options import PreprocessOptions
from tgdpo.command_line import add_columns_argument, add_length_arguments, add_template_arguments, preprocess_options

GIVEN = {
    "--chat-template": "template.jinja",
    "--template-kwargs": '{"enable_thinking": false}',
    "--columns": '{"prompt": "question"}',
    "--max-length": "77",
    "--max-prompt-length": "55",
    "--overlong-prompt": "drop",
}


def test_every_option_reaches_preprocessing() -> None:
    parser = argparse.ArgumentParser()
    for add in (add_template_arguments, add_columns_argument, add_length_arguments):
        add(parser)
    assert {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"} == set(GIVEN)
    given = parser.parse_args([word for item in GIVEN.items() for word in item])
    assert asdict(preprocess_options(given, "tokenizer", workers=3)) == asdict(
        PreprocessOptions(
            tokenizer="tokenizer",
            chat_template="template.jinja",
            template_kwargs={"enable_thinking": False},
            columns={"prompt": "question"},
            max_length=77,
            max_prompt_length=55,
            overlong_prompt="drop",
            workers=3,
        )
    )
