"""Write `train.jsonl` and `heldout.jsonl` beside this file: short orders in English, and the JSON they mean.

The rows are made up, seeded and reproducible: the same script gives the same bytes on every machine.
Held-out rows test more than memory:

- no (customer, item), (item, city) or (customer, city) pair of a held-out row occurs in training;
- every second held-out row is phrased by a template that training never shows;
- the names, items and cities of `UNSEEN` occur in held-out rows only.

Example: python examples/data/make_data.py
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")
SEED = 20240527
TRAIN_ROWS = 640
HELDOUT_ROWS = 64

# Values are separated by bars; an item is its singular and its plural.
FIRST_NAMES = (
    "Mara|Jonas|Priya|Tom|Elena|Hugo|Aisha|Liam|Sofia|Noah|Yuki|Omar|Clara|Ivan|Nina|Diego|Grace|Peter|Leila|Marcus|Anna|"
    "Felix|Ruth|Samuel|Ingrid|Paul|Tara|Victor|Emma|Rafael|Dora|Kofi|Alice|Bruno|Carmen|Daniel|Esther|Frank|Gloria|Henrik"
)
LAST_NAMES = (
    "Lind|Weber|Nair|Okafor|Rossi|Martin|Khan|Byrne|Costa|Fischer|Tanaka|Haddad|Dubois|Petrov|Larsen|Ramos|Kim|Novak|Aziz|"
    "Hill|Kowalski|Braun|Cohen|Osei|Berg|Meyer|Singh|Popa|Jansen|Cruz|Szabo|Mensah|Walker|Silva|Ortiz|Becker|Levy|Moore"
)
ITEMS = (
    "desk lamp/desk lamps|office chair/office chairs|coffee mug/coffee mugs|steel shelf/steel shelves|"
    "wool blanket/wool blankets|garden hose/garden hoses|paint brush/paint brushes|travel bag/travel bags|"
    "wall clock/wall clocks|bread knife/bread knives|phone case/phone cases|yoga mat/yoga mats|tool box/tool boxes|"
    "water bottle/water bottles|picture frame/picture frames|floor mat/floor mats|bike pump/bike pumps|"
    "rain jacket/rain jackets|wooden stool/wooden stools|glass vase/glass vases|soup bowl/soup bowls|"
    "camping tent/camping tents|door handle/door handles|table cloth/table cloths|laptop stand/laptop stands|"
    "power cable/power cables|window blind/window blinds|storage bin/storage bins"
)
CITIES = (
    "Oslo|Lyon|Porto|Bremen|Leeds|Turin|Ghent|Krakow|Malmo|Seville|Austin|Denver|Toronto|Lima|Nairobi|Accra|Osaka|Seoul|"
    "Mumbai|Perth|Dublin|Vienna|Boston|Lisbon|Prague|Cairo|Tampa|Quito"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
QUANTITIES = {
    2: ("2", "two", "a pair of"),
    3: ("3", "three"),
    4: ("4", "four"),
    5: ("5", "five"),
    6: ("6", "six", "half a dozen"),
    7: ("7", "seven"),
    8: ("8", "eight"),
    9: ("9", "nine"),
    10: ("10", "ten"),
    12: ("12", "twelve", "a dozen"),
    15: ("15", "fifteen"),
    20: ("20", "twenty"),
    24: ("24", "two dozen"),
    40: ("40", "forty"),
}
UNSEEN = {
    "first_name": "Oscar|Hana|Bella|Jakub",
    "last_name": "Vance|Suzuki|Moreau|Zeman",
    "item": "kitchen scale/kitchen scales|oak bench/oak benches|fire alarm/fire alarms",
    "city": "Bergen|Geneva|Chicago|Hanoi",
}

# {n} the quantity in words or digits, {items} the plural, {other} a weekday that is not the delivery day.
TRAIN_TEMPLATES = (
    "Please send {n} {items} to {customer} in {city} by {day}.",
    "{customer} from {city} ordered {n} {items}, delivery on {day}.",
    "Hi, this is {customer}. I need {n} {items} in {city} on {day}.",
    "Order for {customer}: {n} {items}, ship to {city}, due {day}.",
    "{customer} wants {n} {items}. Bring them to {city} this {day}.",
    "Can you get {n} {items} to {city} before {day}? Thanks, {customer}",
    "On {day} we deliver {n} {items} to {customer} in {city}.",
    "{n} {items} for {customer}, {city}, {day}.",
    "I would like {n} {items} delivered to {city} on {day}. Best, {customer}",
    "{customer} called on {other}: {n} {items} to {city}, arriving {day}.",
    "Ship to {city}: {n} {items} for {customer}. Needed {day}.",
    "It is {other}. By {day}, {customer} in {city} expects {n} {items}.",
    "Our {city} client {customer} asked for {n} {items} on {day}.",
    "Deliver {day}: {n} {items}, {customer}, {city}.",
    "{customer} needs {n} {items} sent over to {city}, {day} at the latest.",
    "The {n} {items} go to {customer} in {city} on {day}.",
    "Not {other} but {day}: {n} {items} to {city} for {customer}.",
    "For {customer} in {city} please pack {n} {items}. Pickup is {day}.",
    "Reminder: {n} {items} leave for {city} on {day}, attention {customer}.",
    "{city} office here. {customer} is waiting for {n} {items}, promised for {day}.",
    "{day} morning works best for {customer}. It is {n} {items}, address in {city}.",
    "{day}, {city}: {customer} gets {n} {items}.",
    "In {city}, {customer} runs a shop and takes {n} {items} every {day}.",
    "Could I have {n} {items}? I am {customer}, I live in {city}, and {day} is fine.",
    "New order! City {city}, name {customer}, {n} {items}, day {day}.",
    "Change of plan: {customer} takes {n} {items} on {day} instead of {other}. Same address in {city}.",
    "{city} again: {n} {items}, {day}, and the name is {customer}.",
    "Next {day} a courier takes {n} {items} to {city}; {customer} signs for them.",
    "We promised {customer} that {n} {items} would be in {city} by {day}.",
    "{n} {items} were paid for by {customer}. Send them to {city} on {day}.",
    "Good morning, {n} {items} to {city} please, {day} if possible. {customer}",
    "{customer}, {day}, {n} {items}, {city}.",
)
HELDOUT_TEMPLATES = (
    "Hello, {customer} speaking. Could {n} {items} reach {city} by {day}?",
    "We owe {customer} {n} {items}; the truck to {city} leaves {day}.",
    "{day} delivery to {city}: {customer} bought {n} {items}.",
    "Moved from {other} to {day}: {customer}, {city}, {n} {items}.",
    "Put {n} {items} on the {day} van to {city}. They are for {customer}.",
    "{customer} will pick up {n} {items} in {city} next {day}.",
)
QUESTION = "\nWrite down customer, item, quantity, city, day.\n"


@dataclass(frozen=True)
class Order:
    """What one row says; `item` holds singular and plural, joined by a slash."""

    customer: str
    item: str
    quantity: int
    city: str
    day: str

    def pairs(self) -> set[tuple[str, str]]:
        """The value pairs that must not cross from training to the held-out rows."""
        return set(combinations((self.customer, self.item, self.city), 2))


def main() -> None:
    """Write both files beside this script."""
    train, heldout = make_rows(SEED)
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        Path(__file__).with_name(name).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


def make_rows(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows; the same seed gives the same rows on every Python version."""
    rng = Random(seed)
    heldout_orders = distinct_orders(rng, HELDOUT_ROWS, with_unseen=True)
    taken = {pair for order in heldout_orders for pair in order.pairs()}
    train_orders = distinct_orders(rng, TRAIN_ROWS, with_unseen=False, without_pairs=taken)
    train = [make_row(rng, order, TRAIN_TEMPLATES[i % len(TRAIN_TEMPLATES)]) for i, order in enumerate(train_orders)]
    heldout = []
    for i, order in enumerate(heldout_orders):
        templates = HELDOUT_TEMPLATES if i % 2 else TRAIN_TEMPLATES
        heldout.append(make_row(rng, order, templates[i // 2 % len(templates)]))
    return train, heldout


def distinct_orders(
    rng: Random, count: int, *, with_unseen: bool, without_pairs: Collection[tuple[str, str]] = ()
) -> list[Order]:
    """`count` different orders that avoid `without_pairs`."""
    orders: dict[Order, None] = {}
    for order in random_orders(rng, with_unseen=with_unseen):
        if order.pairs().isdisjoint(without_pairs):
            orders[order] = None
        if len(orders) == count:
            break
    return list(orders)


def random_orders(rng: Random, *, with_unseen: bool) -> Iterator[Order]:
    """Orders without end; with `with_unseen`, about a third of the values come from `UNSEEN`."""

    def value(kind: str, seen: str) -> str:
        values = UNSEEN[kind] if with_unseen and rng.random() < 1 / 3 else seen
        return pick(rng, values.split("|"))

    while True:
        yield Order(
            customer=f"{value('first_name', FIRST_NAMES)} {value('last_name', LAST_NAMES)}",
            item=value("item", ITEMS),
            quantity=pick(rng, tuple(QUANTITIES)),
            city=value("city", CITIES),
            day=pick(rng, DAYS),
        )


def make_row(rng: Random, order: Order, template: str) -> dict[str, str]:
    """Phrase one order as a prompt and the JSON that answers it."""
    customer, item, quantity, city, day = astuple(order)
    singular, plural = item.split("/")
    other = pick(rng, [name for name in DAYS if name != day])
    count = pick(rng, QUANTITIES[quantity])
    text = template.format(customer=customer, items=plural, n=count, city=city, day=day, other=other)
    answer = {"customer": customer, "item": singular, "quantity": quantity, "city": city, "day": day}
    completion = "\n".join(f"{key}: {value}" for key, value in answer.items())
    return {"prompt": f"Order: {text}{QUESTION}", "completion": completion}


def pick(rng: Random, values: Sequence[T]) -> T:
    """One of `values`. Only `Random.random` is promised to be the same in every Python version, so no `choice`."""
    return values[int(rng.random() * len(values))]


def to_jsonl(rows: Sequence[dict[str, str]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
