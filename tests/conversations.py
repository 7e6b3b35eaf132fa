"""Ten realistic pairs (twenty conversations): several turns, code, numbers, other scripts."""

from pathlib import Path

from dwrl_fast.data import Message, Preference

TURNS: list[tuple[list[str], str, str]] = [
    (
        ["How do I get red wine out of a white shirt?"],
        "Blot it with a clean cloth, don't rub. Then cover the stain with salt, wait and rinse with cold water.",
        "Wine is made from grapes, and people have been drinking it for about 8,000 years.",
    ),
    (
        ["Write a Python function that reverses a string."],
        "```python\ndef reverse(text: str) -> str:\n    return text[::-1]\n```",
        "```python\ndef reverse(text):\n    for c in text:\n        text = c\n    return text\n```",
    ),
    (
        [
            "I'm planning a trip to Lisbon in May.",
            "Lovely! What do you like: food, museums, the sea?",
            "Food, and I don't eat meat.",
        ],
        "Then try the Time Out Market for a start, and book a table at Ao 26 - it's vegan and fills up early.",
        "You must try the bifana, a pork sandwich that every café sells.",
    ),
    (
        ["A train leaves at 14:35 and takes 2 h 50 min. When does it arrive?"],
        "14:35 + 2 h = 16:35, and 50 minutes later it is 17:25.",
        "It arrives at 16:85.",
    ),
    (
        ["Kannst du mir kurz erklären, was ein Zinseszins ist?"],
        "Du bekommst Zinsen nicht nur auf dein Geld, sondern auch auf die Zinsen von früher. Es wächst schneller.",
        "Zinseszins ist ein Fluss in Österreich.",
    ),
    (
        ["my neighbor plays loud music every night, what should i do??"],
        "Talk to them first, calmly and at a time when the music is off. Many people don't know how much comes through "
        "the wall. If that changes nothing, write down the times and tell the landlord.",
        "Play your own music louder.",
    ),
    (
        ["Translate to English: 今日は天気がいいですね。"],
        '"The weather is nice today, isn\'t it?"',
        "I am a weather forecast from yesterday. 🙂",
    ),
    (
        ["Summarise in one sentence: The committee met twice, disagreed on the budget, and put the vote off to June."],
        "After two meetings without agreement on the budget, the committee postponed its vote until June.",
        "The committee met twice. It disagreed on the budget. It put the vote off to June. June is a month.",
    ),
    (
        ["Is it safe to take ibuprofen together with aspirin?", "Do you take aspirin every day?", "Yes, for my heart."],
        "Then please ask your doctor first: ibuprofen can keep a daily aspirin from protecting your heart.",
        "Sure, take as many of both as you like.",
    ),
    (
        ["Give me three names for a bakery."],
        "1. The Rolling Pin\n2. Crumb & Co.\n3. Early Rise",
        "1. Bakery\n2. Bakery\n3. Shoe shop",
    ),
]
PAIRS = [
    Preference(
        tuple(Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)),
        (chosen, rejected),
        source=f"{Path(__file__).name}:{k}",
    )
    for k, (turns, chosen, rejected) in enumerate(TURNS, 1)
]
