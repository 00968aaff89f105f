#!/usr/bin/env bash
# Guess:   apply_chat_template hands the messages to the template as they are; a turn with "content": null, as the OpenAI format writes one that only
#          calls a tool, is none there, and a template that asks `message['content'] is none` takes its branch for calls.
# So:      keys whose value is None are taken out first, by intent. In the template the content is then undefined, and undefined is not none: the
#          branch for calls is never taken, the one for text is, with nothing in it. No error, no warning; the call is gone from the text. The
#          same template in plain jinja writes the call. An empty string does not help; `message.get('content') is none` works both ways.
# Version: transformers 5.24.0, jinja2 3.1.6
# Why:     templates of some published chat models test in this way (`is none`, and `is not none` for text). Preference pairs whose chosen side is a
#          tool call become an empty turn there: both sides may be equal, or the loss teaches to end the turn at once.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q transformers==5.24.0 jinja2==3.1.6
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error env/bin/python - <<'PY'
import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print("transformers", transformers.__version__, "jinja2", jinja2.__version__)
ASKS = "message['content'] is none"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if " + ASKS + " %}CALL {{ message['tool_calls'][0]['function']['name'] }}{% else %}{{ message['content'] }}{% endif %}"
    "<end>{% endfor %}")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))


def chat(name, content=None):
    call = {"type": "function", "function": {"name": name, "arguments": {"city": "Oslo"}}}
    return [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": content, "tool_calls": [call]}]


def by_tokenizer(messages, template=TEMPLATE):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def by_jinja(messages, template=TEMPLATE):
    return jinja2.Template(template).render(messages=messages)


chosen, rejected = chat("get_weather"), chat("delete_files")
wide = TEMPLATE.replace(ASKS, "message.get('content') is none")
seen = {
    "plain jinja, chosen": by_jinja(chosen), "plain jinja, rejected": by_jinja(rejected),
    "apply_chat_template, chosen": by_tokenizer(chosen), "apply_chat_template, rejected": by_tokenizer(rejected),
    "apply_chat_template, content ''": by_tokenizer(chat("get_weather", "")),
    "apply_chat_template, .get": by_tokenizer(chosen, wide), "plain jinja, .get": by_jinja(chosen, wide)}
for name, text in seen.items():
    print(f"{name:32}{text}")
right, lost = "<user>Rain?<end><assistant>CALL get_weather<end>", "<user>Rain?<end><assistant><end>"
held = list(seen.values()) == [right, right.replace("get_weather", "delete_files"), lost, lost, lost, right, right]
raise SystemExit(not held)
PY

# Output seen:
#   transformers 5.24.0 jinja2 3.1.6
#   plain jinja, chosen             <user>Rain?<end><assistant>CALL get_weather<end>
#   plain jinja, rejected           <user>Rain?<end><assistant>CALL delete_files<end>
#   apply_chat_template, chosen     <user>Rain?<end><assistant><end>
#   apply_chat_template, rejected   <user>Rain?<end><assistant><end>
#   apply_chat_template, content '' <user>Rain?<end><assistant><end>
#   apply_chat_template, .get       <user>Rain?<end><assistant>CALL get_weather<end>
#   plain jinja, .get               <user>Rain?<end><assistant>CALL get_weather<end>
