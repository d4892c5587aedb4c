//! The bytes that each token writes, which a tokenizer holds in one of two spellings.
//!
//! Byte-level tokenizers (GPT-2's way) spell every byte as a printable character; those with byte fallback (SentencePiece's
//! way) spell text as it is with `\u{2581}` for a space, and single bytes as `<0xE2>`.

use std::collections::HashMap;

/// How tokens are spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    ByteLevel,
    ByteFallback,
}

impl Spelling {
    /// Tells it from the tokenizer's decoder as `tokenizer.json` writes it.
    pub(super) fn of(decoder: &str) -> Option<Self> {
        let holds = |kind: &str| decoder.contains(&format!("\"{kind}\""));
        if holds("ByteLevel") {
            Some(Spelling::ByteLevel)
        } else {
            (holds("ByteFallback") || holds("Metaspace")).then_some(Spelling::ByteFallback)
        }
    }

    /// Returns the bytes of a token; none where it is not spelt so.
    pub(super) fn bytes(self, token: &str, alphabet: &HashMap<char, u8>) -> Option<Vec<u8>> {
        match self {
            Spelling::ByteLevel => token.chars().map(|c| alphabet.get(&c).copied()).collect(),
            Spelling::ByteFallback => {
                let single = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match single.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => Some(vec![byte]),
                    None => Some(token.replace('\u{2581}', " ").into_bytes()),
                }
            }
        }
    }
}

/// Returns the byte that each character of GPT-2's alphabet stands for: printable bytes stand for themselves, the others
/// follow from U+0100 on (Radford et al. 2019, `bytes_to_unicode`).
pub(super) fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let own = (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte));
    let others = (0..=255u8).filter(|byte| !printable(byte)).zip('\u{100}'..).map(|(byte, c)| (c, byte));
    own.chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_give_back_the_bytes() {
        let alphabet = alphabet();
        assert_eq!(alphabet.len(), 256);
        let level = |token| Spelling::ByteLevel.bytes(token, &alphabet);
        assert_eq!(level("\u{120}caf\u{c3}\u{a9}\u{10a}"), Some(" café\n".as_bytes().to_vec()));
        assert_eq!(level("日"), None, "no character of the alphabet");
        let fallback = |token| Spelling::ByteFallback.bytes(token, &alphabet);
        assert_eq!(fallback("\u{2581}日a"), Some(" 日a".as_bytes().to_vec()));
        assert_eq!((fallback("<0xE2>"), fallback("<0xzz>")), (Some(vec![0xE2]), Some(b"<0xzz>".to_vec())));
    }

    #[test]
    fn the_decoder_tells_the_spelling() {
        assert_eq!(Spelling::of(r#"{"type":"ByteLevel"}"#), Some(Spelling::ByteLevel));
        let sequence = r#"{"type":"Sequence","decoders":[{"type":"Replace"},{"type":"ByteFallback"},{"type":"Fuse"}]}"#;
        assert_eq!(Spelling::of(sequence), Some(Spelling::ByteFallback));
        assert_eq!(Spelling::of(r#"{"type":"WordPiece"}"#), None);
    }
}
