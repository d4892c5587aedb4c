//! What a payload may be wrapped in: a compression of the producer's own, or a schema registry's header.
//!
//! Kafka's own compression is undone by the client. Some producers compress values themselves; it is recognised by the
//! first bytes, which no JSON has. A small record must not become a large one: what it may grow to is limited by its
//! size and absolutely.

use std::borrow::Cow;
use std::io::{self, Read};

use super::{Reason, Refusal};

/// Most bytes that a record may hold once it is unpacked.
pub const MAX_UNPACKED: usize = 64 << 20;

/// How many times its size a record may grow; text shrinks to a twentieth at best, repeated text to less.
pub const MAX_RATIO: usize = 200;

/// A record may always grow to this size.
const ALWAYS: usize = 1 << 20;

/// Largest window of zstd as a power of two: what one stream may take of the memory.
const ZSTD_WINDOW: u32 = 26;

const GZIP: &[u8] = &[0x1F, 0x8B];
const ZSTD: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];
const LZ4: &[u8] = &[0x04, 0x22, 0x4D, 0x18];

/// Returns the bytes of a payload without what they are wrapped in.
pub(super) fn open(payload: &[u8]) -> Result<Cow<'_, [u8]>, Refusal> {
    let payload = without_registry_header(payload);
    let (name, reader): (_, io::Result<Box<dyn Read + '_>>) = if payload.starts_with(GZIP) {
        ("gzip", Ok(Box::new(flate2::read::MultiGzDecoder::new(payload))))
    } else if payload.starts_with(ZSTD) {
        ("zstd", zstd_reader(payload))
    } else if payload.starts_with(LZ4) {
        ("lz4", Ok(Box::new(lz4_flex::frame::FrameDecoder::new(payload))))
    } else {
        return Ok(Cow::Borrowed(payload));
    };
    let limit = (payload.len().saturating_mul(MAX_RATIO)).clamp(ALWAYS, MAX_UNPACKED);
    let mut plain = Vec::new();
    let read = reader.and_then(|reader| reader.take(limit as u64 + 1).read_to_end(&mut plain));
    match read {
        Err(error) => {
            Err(Refusal::dead(Reason::BadCompression, format!("the {name} data cannot be unpacked: {error}")))
        }
        Ok(_) if plain.len() > limit => {
            let message = format!("the {name} data of {} bytes holds more than {limit}", payload.len());
            Err(Refusal::dead(Reason::TooLarge, message))
        }
        Ok(_) => Ok(Cow::Owned(plain)),
    }
}

fn zstd_reader(payload: &[u8]) -> io::Result<Box<dyn Read + '_>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(payload)?;
    decoder.window_log_max(ZSTD_WINDOW)?;
    Ok(Box::new(decoder))
}

/// Takes off the header that serialisers of a schema registry write: a zero and the schema's number, in front of JSON.
fn without_registry_header(payload: &[u8]) -> &[u8] {
    match payload {
        [0, _, _, _, _, rest @ ..] if matches!(rest.first(), Some(b'{' | b'[')) => rest,
        _ => payload,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const TEXT: &[u8] = br#"{"request":{"messages":[{"role":"user","content":"Hi"}]}}"#;

    fn packed(bytes: &[u8]) -> [Vec<u8>; 3] {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(bytes).unwrap();
        [gzip.finish().unwrap(), zstd::encode_all(bytes, 1).unwrap(), lz4.finish().unwrap()]
    }

    #[test]
    fn every_compression_is_undone_and_plain_bytes_stay() {
        for payload in packed(TEXT) {
            assert_eq!(open(&payload).unwrap(), TEXT);
        }
        assert_eq!(open(TEXT).unwrap(), TEXT);
        assert_eq!(open(&[&[0, 0, 0, 0, 7], TEXT].concat()).unwrap(), TEXT);
        assert_eq!(open(&[0, 0, 0, 0, 7, 8]).unwrap().as_ref(), [0, 0, 0, 0, 7, 8]);
    }

    #[test]
    fn broken_data_and_bombs_are_refused() {
        for payload in packed(TEXT) {
            let reason = open(&payload[..payload.len() - 5]).unwrap_err().reason;
            assert_eq!(reason, Reason::BadCompression);
        }
        for payload in packed(&vec![b' '; MAX_UNPACKED + 1]) {
            assert_eq!(open(&payload).unwrap_err().reason, Reason::TooLarge);
        }
        let [_, zstd, _] = packed(&vec![b' '; 2 * ALWAYS]);
        assert!(zstd.len() * MAX_RATIO < ALWAYS);
        assert_eq!(open(&zstd).unwrap_err().reason, Reason::TooLarge);
    }
}
