//! What a pattern cannot tell: checksums, entropy, placeholders.

/// Takes whatever the pattern found.
pub(super) fn any(_: &str) -> bool {
    true
}

/// Returns true where characters look drawn: no `xxxx…`, no words with dashes.
pub(super) fn random(value: &str) -> bool {
    entropy(value) >= 3.2 && value.bytes().any(|b| b.is_ascii_digit())
}

/// The same for a value that only its name gives away: denser, and none of the usual stand-ins.
pub(super) fn dense(value: &str) -> bool {
    let classes: [fn(&u8) -> bool; 3] = [u8::is_ascii_lowercase, u8::is_ascii_uppercase, u8::is_ascii_digit];
    let used = classes.iter().filter(|class| value.bytes().any(|b| class(&b))).count();
    let is_hex = value.len() >= 24 && value.bytes().all(|b| b.is_ascii_hexdigit());
    (used == 3 || is_hex) && entropy(value) >= 3.3 && !is_placeholder(value) && !value.contains("..")
}

/// Returns true where a password in a URL is one, and not a word for it.
pub(super) fn password(value: &str) -> bool {
    !is_placeholder(value) && !value.starts_with(['$', '{', '<', '[', '%', '*'])
}

fn is_placeholder(value: &str) -> bool {
    let lower = value.to_ascii_lowercase();
    let words = [
        "password",
        "passwd",
        "example",
        "your",
        "secret",
        "changeme",
        "placeholder",
        "xxxx",
        "****",
        "token",
        "<",
        "${",
    ];
    words.iter().any(|word| lower.contains(word)) || ["pass", "pwd", "pw"].contains(&lower.as_str())
}

/// Returns the Shannon entropy of the characters, in bits each.
fn entropy(value: &str) -> f64 {
    let mut counts = [0u32; 256];
    value.bytes().for_each(|b| counts[usize::from(b)] += 1);
    let n = value.len() as f64;
    let share = |count: &u32| f64::from(*count) / n;
    counts.iter().filter(|count| **count > 0).map(|count| -share(count) * share(count).log2()).sum()
}

fn digits(value: &str) -> Vec<u32> {
    value.chars().filter_map(|c| c.to_digit(10)).collect()
}

/// Checks a card number: its issuer's first digits and Luhn's sum (ISO/IEC 7812).
pub(super) fn card(value: &str) -> bool {
    let digits = digits(value);
    let is_issued = matches!(digits.first(), Some(3..=6)) && digits.iter().any(|digit| *digit != digits[0]);
    let doubled = |digit: u32| if digit > 4 { 2 * digit - 9 } else { 2 * digit };
    let sum: u32 = digits.iter().rev().enumerate().map(|(i, d)| if i % 2 == 1 { doubled(*d) } else { *d }).sum();
    is_issued && (13..=19).contains(&digits.len()) && sum.is_multiple_of(10)
}

/// Checks an IBAN: letters as numbers, the first four characters last, modulo 97 (ISO 13616).
pub(super) fn iban(value: &str) -> bool {
    let compact: Vec<char> = value.chars().filter(|c| *c != ' ').collect();
    if !(15..=34).contains(&compact.len()) {
        return false;
    }
    let turned = compact[4..].iter().chain(&compact[..4]);
    let step = |rest: u32, c: &char| match c.to_digit(36) {
        Some(digit @ 0..=9) => (rest * 10 + digit) % 97,
        Some(letter) => (rest * 100 + letter) % 97,
        None => rest,
    };
    turned.fold(0, step) == 1
}

/// Takes what can be a telephone number: with a country's code or in groups, of a length that is dialled, and neither a
/// date, nor a card, nor a row of equal digits.
pub(super) fn phone(value: &str) -> bool {
    let all = digits(value);
    let groups: Vec<&str> = value.split([' ', '.', '-', '(', ')']).filter(|group| !group.is_empty()).collect();
    let is_equal = all.iter().all(|digit| Some(digit) == all.first());
    let is_date =
        groups.len() == 3 && groups.iter().any(|g| g.len() == 4) && groups.iter().filter(|g| g.len() <= 2).count() == 2;
    let is_international = value.starts_with('+') && (8..=15).contains(&all.len());
    // North American: three, three, four. Elsewhere a leading 0 and at least nine digits.
    let is_american = groups.iter().map(|group| group.len()).collect::<Vec<_>>().ends_with(&[3, 3, 4])
        && all.len() <= 11
        && value.chars().any(|c| "-.(".contains(c));
    let is_national = value.starts_with(['0', '(']) && (9..=12).contains(&all.len()) && groups.len() >= 2;
    !is_equal && !is_date && (is_international || is_american || is_national)
}

/// Takes a number that the US could have issued.
pub(super) fn ssn(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let [area, group, serial] = parts.as_slice() else { return false };
    !["000", "666"].contains(area) && !area.starts_with('9') && *group != "00" && *serial != "0000"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_take_the_published_examples_and_nothing_next_to_them() {
        for number in ["4111 1111 1111 1111", "5555555555554444", "378282246310005", "6011-1111-1111-1117"] {
            assert!(card(number), "{number}");
        }
        for number in ["4111 1111 1111 1112", "1234567812345670", "0000000000000000"] {
            assert!(!card(number), "{number}");
        }
        for number in ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR1420041010050500013M02606"] {
            assert!(iban(number), "{number}");
        }
        assert!(!iban("DE88 3704 0044 0532 0130 00") && !iban("DE89"));
        assert!(ssn("219-09-9999") && !ssn("000-12-3456") && !ssn("987-65-4320"));
    }

    #[test]
    fn telephone_numbers_are_no_dates_and_no_versions() {
        for number in ["+49 30 901820", "(212) 555-0142", "212-555-0142", "020 7946 0958", "+14155550123"] {
            assert!(phone(number), "{number}");
        }
        for number in ["2026-03-01", "01.02.2026", "10 20 30", "127.0.0.1", "1.2.3", "1000 2000"] {
            assert!(!phone(number), "{number}");
        }
    }

    #[test]
    fn entropy_tells_drawn_from_written() {
        assert_eq!(entropy("aaaa"), 0.0);
        assert_eq!(entropy("abcd"), 2.0);
        assert!(dense("q8Zr2LmX0vTb7Yw") && !dense("aaaaaaaaaaaaaaaA1") && !dense("YourSecretKey123"));
    }
}
