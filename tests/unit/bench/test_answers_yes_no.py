"""Yes and no as a person reads them, and what is neither."""

from __future__ import annotations

import pytest

from mmalign.bench.parsers import yes_no

YES = """
Yes!!!
Yeah, he does.
Sure, he does
Of course.
Definitely
Indeed
That is correct.
This is true
The claim is not false.
Yes: the dog runs
Yes - no dog
Yes or no: yes
Please answer yes or no. Yes
Perhaps yes
I think so, yes
No doubt, yes
No worries, yes.
It is not clear, but I would say yes.
The answer is yes because he jumps
So yes
It is a yes
Does he jump? Yes
I cannot see well, so yes
Yes, I am not sure of the rest
Yes he does, he says no to her
Based on the video, yes.
A. Yes
1. Yes
{"answer": "yes"}
<think>No.</think>\\n<answer>Yes</answer>
<answer>Yes, the man jumps</answer>
\\boxed{\\text{yes}}
Yes</s>No
Ｙｅｓ。
“Yes”
Y
是。
是的，有一只狗
对
正确
没错
答案是：是
Sí, hay un perro
La respuesta es sí
Claro que sí
Verdadero
Oui, il saute
La réponse est oui.
Bien sûr
Vrai
Ja, er springt
Die Antwort ist ja
Stimmt
"""
NO = """
Nah
Of course not
Absolutely not!
Not really
Not true
That's not correct.
It is false
No dogs are visible
No, but there is a cat
Yes or no: no
Probably not
I don't think so
Without doubt, no
No way
Never
Nobody jumps.
There isn't a dog
In the video, the woman is not singing.
The man never jumps.
**Answer**: No
Answer:\\nNo
The final answer is no, though I first said yes
Was it a cat? No.
Is there a dog? Yes. Is it running? No. So the answer is no.
I'd say no.
That's a no
As far as I can see, no
(B) No
yes</think>no
<answer>no</answer> yes
No\\n\\nThe man says yes to her
no<|endoftext|>Yes
No！
N
不
不是的
没有，视频中没有猫
视频中没有狗
否
错误
No, no hay
No hay ningún perro
La respuesta es no
Falso
Non, il ne saute pas
Il n'y a pas de chien
Pas du tout
Faux
Nein, tut er nicht
Er springt nicht
Kein Hund ist zu sehen
Stimmt nicht
"""
NONE = """
Yes and no.
yes or no?
a yes or a no
Yes/No
True or false
No, yes
Yes. No.
YES NO
Maybe
Possibly
I'm not sure
Not clear
It is unclear whether he jumps.
It cannot be determined
I can't say
No idea
No answer
There is not enough information.
I'm sorry, but I can't watch videos.
I do not have access to the video.
If he jumps, yes
It depends
He does not stop jumping.
He not only jumps but also runs
It is not a dog but a cat
He is jumping, not running
The man wears no hat and jumps
There is a dog and nothing else
The dog barks.
Yesterday he jumped
Noon
He says yes.
The sign reads YES
He says no
<think>yes
<answer>yes</answer><answer>no</answer>
<answer>yes or no</answer>
不知道
无法判断
是否
是或否
No lo sé
No estoy seguro
No se puede determinar
Sí o no
Je ne sais pas
Oui ou non
Ich weiß es nicht.
Nicht sicher
Ja oder nein
Keine Ahnung
yes yes no
None of the above
"""


def lines(block: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in block.strip().split("\n")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(t, said) for block, said in ((YES, "yes"), (NO, "no"), (NONE, None)) for t in lines(block)],
)
def test_yes_and_no_are_read_as_a_person_reads_them(text: str, expected: str | None) -> None:
    assert yes_no(text) == expected


def test_nothing_at_all_is_neither() -> None:
    assert yes_no("") is None
    assert yes_no(" \n") is None
