"""Which numbers and addresses are personal data, and which only look like it."""

from __future__ import annotations

import time

import pytest

from alignkit.data.hygiene.personal_data import personal_data

# Put together at run time, so that no scanner takes this file for a leak.
GITHUB, OPENAI, AWS = "ghp_" + "a1B2" * 9, "sk-" + "proj-" + "a1B2" * 6, "AKIA" + "IOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write to anna.b+news@mail.firm.de.", "e-mail address"),
        ("请联系我：zhang_san@qq.com谢谢", "e-mail address"),
        ("邮箱 ｌｉ＠１６３．ｃｏｍ", "e-mail address"),
        ("Call +49 (0)30 1234 5678 today", "phone number"),
        ("Call (212) 736-5000.", "phone number"),
        ("Fax 800-540-7085", "phone number"),
        ("手机号13812345678，座机010-62751234", "phone number"),
        ("电话：010-62751234", "phone number"),
        ("+86 138 1234 5678", "phone number"),
        ("My card is 4111 1111 1111 1111, thanks", "card number"),
        ("卡号6222021234567890128", "card number"),
        ("Amex 3782-822463-10005", "card number"),
        ("Pay to DE89 3704 0044 0532 0130 00 NOW", "bank account number"),
        ("GB82WEST12345698765432", "bank account number"),
        ("Logged in from 93.184.216.34.", "IP address"),
        ("Logged in from 2606:2800:220:1:248:1893:25c8:1946", "IP address"),
        ("身份证号11010519491231002X。", "Chinese identity number"),
        ("SSN 219-09-9998", "US social security number"),
        (f"export TOKEN={GITHUB}", "secret key"),
        (f"key: '{OPENAI}'", "secret key"),
        (f"{AWS} is the key", "secret key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "secret key"),
    ],
)
def test_what_is_found(text: str, kind: str) -> None:
    assert kind in personal_data(text)


@pytest.mark.parametrize(
    "text",
    [
        "Write to user@example.com or to me@host.",
        "@decorator\ndef f(a@b): ...",
        "Call 555-123-4567 or (212) 555-0123, says the film.",
        "There are 15000000000 stars, or 13,812,345,678 of them.",
        "pi is 3.14159265358979, and 1234567890 is a number",
        "from 2008-09-10 to 2010-11-12, pages 212-736, order 2024-1234-5678",
        "4111 1111 1111 1112 fails the checksum of Luhn",
        "1234567812345670 passes it, but no bank gives such cards",
        "DE88 3704 0044 0532 0130 00 fails modulo 97",
        "ISBN 978-3-16-148410-0",
        "at home it is 192.168.1.10, 127.0.0.1 or 2001:db8::1",
        "since version 1.2.3.4, 版本 2.3.4.5",
        "std::vector<int> a::b; it is 12:34:56",
        "110105194912310021 fails its checksum",
        "000-12-3456 was never given out",
        "sk-learn is a library, and hf_hub too",
        "小明有5个苹果，2024年1月1日给了小红3个。",
        "",
    ],
)
def test_what_is_not(text: str) -> None:
    assert personal_data(text) == []


def test_several_kinds_are_named_once_each() -> None:
    text = "a@firm.de b@firm.de 4111111111111111"
    assert personal_data(text) == ["e-mail address", "card number"]


@pytest.mark.parametrize("piece", ["1", "1-", "+1", "a.", "a@", "a1.", "eyJ-", "AA11 ", "2001:", "1.1.", "(212) ", "-"])
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    began = time.process_time()
    personal_data(piece * 20_000)
    assert time.process_time() - began < 5
