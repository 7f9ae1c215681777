"""The only records that cross a process or a wire: specs, orders, facts and data rows.

Everything here is a frozen msgspec struct: decoding refuses unknown fields and
wrong types, so two processes either understand each other or say so.
"""

PROTOCOL_VERSION = 1
