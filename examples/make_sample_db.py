"""Makes shop.db, the sample database: a year of a small shop for coffee, tea and what one needs for them.

    python examples/make_sample_db.py [FILE]

It is the same, byte for byte, whenever it is made by the same SQLite: the random numbers have a seed.
"""

import random
import sqlite3
import struct
import sys
import zlib
from datetime import date, timedelta
from pathlib import Path

SCHEMA = """
CREATE TABLE categories (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE products (
    id INTEGER PRIMARY KEY,
    category_id INTEGER NOT NULL REFERENCES categories(id),
    name TEXT NOT NULL,
    price_cents INTEGER NOT NULL CHECK (price_cents > 0),
    stock INTEGER NOT NULL DEFAULT 0,
    discontinued_on TEXT,
    picture BLOB
);
CREATE TABLE customers (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    email TEXT UNIQUE,
    city TEXT NOT NULL,
    country TEXT NOT NULL DEFAULT 'DE',
    created_at TEXT NOT NULL
);
CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers(id) ON DELETE CASCADE,
    ordered_at TEXT NOT NULL,
    shipped_at TEXT,
    status TEXT NOT NULL CHECK (status IN ('open', 'shipped', 'cancelled')),
    note TEXT
);
CREATE TABLE order_items (
    order_id INTEGER NOT NULL REFERENCES orders(id) ON DELETE CASCADE,
    product_id INTEGER NOT NULL REFERENCES products(id),
    quantity INTEGER NOT NULL DEFAULT 1,
    price_cents INTEGER NOT NULL,
    PRIMARY KEY (order_id, product_id)
) WITHOUT ROWID;
CREATE INDEX orders_by_customer ON orders (customer_id, ordered_at);
CREATE VIEW revenue_by_month AS
    SELECT substr(ordered_at, 1, 7) AS month, count(DISTINCT orders.id) AS orders,
           round(sum(quantity * price_cents) / 100.0, 2) AS revenue
      FROM orders JOIN order_items ON order_items.order_id = orders.id
     WHERE status <> 'cancelled'
     GROUP BY month;
"""
PRODUCTS = {
    "Coffee": ["Yirgacheffe 250 g", "Huila 250 g", "House Espresso 1 kg", "Decaf Sumatra 250 g", "Kenya AA 250 g"],
    "Tea": ["Sencha 100 g", "Darjeeling First Flush 100 g", "Earl Grey 100 g", "Rooibos 200 g", "Pu-erh 100 g"],
    "Brewing": ["Hand grinder", "French press 1 l", "Gooseneck kettle", "Dripper size 2", "Paper filters, 100"],
    "Cups": ["Espresso cup", "Cappuccino cup", "Tea bowl", "Travel mug 0.4 l"],
}
FIRST = "Ada Ben Chloé Deniz Emil Freya Goran Hanna Iris Jörg Kofi Lena Mateo Nora Olu Pia Rosa Sven Tuva".split()
LAST = "Arslan Bauer Costa Dubois Eriksen Fischer García Horvat Ito Jansen Keller Lindqvist Meyer Novak Okafor".split()
CITIES = [("Berlin", "DE"), ("Hamburg", "DE"), ("München", "DE"), ("Wien", "AT"), ("Zürich", "CH"), ("Lyon", "FR")]
NOTES = ["Please ring twice.", "Gift: no invoice in the parcel.", "Leave it with the neighbour.", "Grind for espresso."]


def picture(rng: random.Random) -> bytes:
    """A PNG image of 4 by 4 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + rng.randbytes(12) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    stored = zlib.compress(pixels, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def fill(connection: sqlite3.Connection, rng: random.Random) -> None:
    """All rows."""
    for number, (category, names) in enumerate(PRODUCTS.items(), 1):
        connection.execute("INSERT INTO categories VALUES (?, ?)", (number, category))
        for name in names:
            gone = "2025-06-30" if rng.random() < 0.1 else None
            image = picture(rng) if rng.random() < 0.7 else None
            row = (number, name, rng.randrange(490, 8900, 10), 0 if gone else rng.randrange(120), gone, image)
            connection.execute("INSERT INTO products VALUES (NULL, ?, ?, ?, ?, ?, ?)", row)
    prices = dict(connection.execute("SELECT id, price_cents FROM products"))
    people = rng.sample([(first, last) for first in FIRST for last in LAST], 120)
    for first, last in people:
        email = f"{first}.{last}@example.com".lower() if rng.random() < 0.9 else None
        joined = date(2024, 1, 1) + timedelta(days=rng.randrange(365))
        row = (f"{first} {last}", email, *rng.choice(CITIES), joined.isoformat())
        connection.execute("INSERT INTO customers VALUES (NULL, ?, ?, ?, ?, ?)", row)
    for day in sorted(rng.randrange(365) for _ in range(600)):
        ordered = date(2025, 1, 1) + timedelta(days=day)
        status = "open" if day > 358 else rng.choices(["shipped", "cancelled"], [95, 5])[0]
        shipped = (ordered + timedelta(days=rng.randrange(1, 5))).isoformat() if status == "shipped" else None
        time = f"{ordered.isoformat()}T{rng.randrange(7, 23):02}:{rng.randrange(60):02}:00Z"
        note = rng.choice(NOTES) if rng.random() < 0.08 else None
        row = (rng.randrange(1, len(people) + 1), time, shipped, status, note)
        order = connection.execute("INSERT INTO orders VALUES (NULL, ?, ?, ?, ?, ?)", row).lastrowid
        for product in rng.sample(sorted(prices), rng.choice([1, 1, 2, 2, 3, 4])):
            item = (order, product, rng.choice([1, 1, 1, 2, 3]), prices[product])
            connection.execute("INSERT INTO order_items VALUES (?, ?, ?, ?)", item)


def main() -> None:
    """Make the file anew."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("shop.db")
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    fill(connection, random.Random(20250101))  # noqa: S311 -- a sample needs no secret randomness
    connection.commit()
    connection.execute("VACUUM")
    connection.close()


if __name__ == "__main__":
    main()
