//! What a payload may be wrapped in: a compression of the producer's own, or a schema registry's header.
//!
//! Kafka's own compression is undone by the client. Some producers compress values themselves; it is recognised by the
//! first bytes, which no JSON has. A small record must not become a large one: what it may grow to is limited by its
//! size and absolutely.

use std::borrow::Cow;
use std::cell::Cell;
use std::io::{self, Read};

use super::{Reason, Refusal, shape, too_many_values};

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

/// The bytes of a frame of lz4 with nothing in it: its header and its end.
const LZ4_SMALLEST: usize = 11;

/// Returns the bytes of a payload without what they are wrapped in.
pub(super) fn open(payload: &[u8]) -> Result<Cow<'_, [u8]>, Refusal> {
    unpack(without_registry_header(payload), MAX_UNPACKED)
}

/// What the bodies inside one record may still come to. Each could grow as a record may, and a record may hold thousands:
/// so they share the limits of one.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: Cell<usize>,
    values: Cell<usize>,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { bytes: Cell::new(MAX_UNPACKED), values: Cell::new(shape::MAX_VALUES) }
    }
}

impl Budget {
    /// Returns the bytes of a body without what they are wrapped in.
    pub(super) fn open<'a>(&self, body: &'a [u8]) -> Result<Cow<'a, [u8]>, Refusal> {
        let left = self.bytes.get();
        let plain = unpack(body, left);
        // What is refused was unpacked up to its limit.
        let used = plain.as_ref().map_or_else(|_| limit(body, left), |plain| plain.len());
        self.bytes.set(left.saturating_sub(used));
        let plain = plain?;
        let values = self.values.get().checked_sub(shape::values(&plain)).ok_or_else(too_many_values)?;
        self.values.set(values);
        Ok(plain)
    }
}

/// Returns how many bytes some packed bytes may hold.
fn limit(packed: &[u8], most: usize) -> usize {
    packed.len().saturating_mul(MAX_RATIO).max(ALWAYS).min(most)
}

fn unpack(payload: &[u8], most: usize) -> Result<Cow<'_, [u8]>, Refusal> {
    let limit = limit(payload, most);
    let (name, plain) = if payload.starts_with(GZIP) {
        ("gzip", up_to(limit, flate2::read::MultiGzDecoder::new(payload)))
    } else if payload.starts_with(ZSTD) {
        ("zstd", zstd_reader(payload).and_then(|reader| up_to(limit, reader)))
    } else if payload.starts_with(LZ4) {
        ("lz4", lz4_frames(limit, payload))
    } else {
        return Ok(Cow::Borrowed(payload));
    };
    match plain {
        Err(error) => Err(Refusal::dead(
            Reason::BadCompression,
            format!("the {name} data cannot be unpacked ({error}): send it whole"),
        )),
        Ok(plain) if plain.len() > limit => {
            let message =
                format!("the {name} data of {} bytes holds more than {limit}: send smaller records", payload.len());
            Err(Refusal::dead(Reason::TooLarge, message))
        }
        Ok(plain) => Ok(Cow::Owned(plain)),
    }
}

/// Reads to the end, or to one byte past the limit.
fn up_to(limit: usize, reader: impl Read) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    reader.take(limit as u64 + 1).read_to_end(&mut plain)?;
    Ok(plain)
}

/// Reads all frames of lz4, one after the other: unlike the decoders of gzip and zstd, this one stops after each.
fn lz4_frames(limit: usize, payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut decoder = lz4_flex::frame::FrameDecoder::new(payload);
    let mut plain = Vec::new();
    while !decoder.get_ref().is_empty() && plain.len() <= limit {
        let (left, room) = (decoder.get_ref().len(), (limit + 1 - plain.len()) as u64);
        decoder.by_ref().take(room).read_to_end(&mut plain)?;
        // A header that breaks off is read as the end of the data.
        if left - decoder.get_ref().len() < LZ4_SMALLEST {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
    }
    Ok(plain)
}

fn zstd_reader(payload: &[u8]) -> io::Result<impl Read> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(payload)?;
    decoder.window_log_max(ZSTD_WINDOW)?;
    Ok(decoder)
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
    fn data_in_several_frames_is_read_whole() {
        for (first, second) in packed(TEXT).into_iter().zip(packed(b" and more")) {
            assert_eq!(open(&[first, second].concat()).unwrap(), [TEXT, b" and more"].concat());
        }
        for nothing in packed(b"") {
            assert_eq!(open(&nothing).unwrap(), b"".as_slice());
        }
    }

    #[test]
    fn bodies_of_one_record_share_a_limit() {
        let numbers =
            |bytes: usize| (0u64..).flat_map(|n| (n * n).to_string().into_bytes()).take(bytes).collect::<Vec<u8>>();
        let (budget, body) = (Budget::default(), packed(&numbers(MAX_UNPACKED / 4)));
        let opened = (0..6).map(|_| budget.open(&body[0]).map(|plain| plain.len()).map_err(|refusal| refusal.reason));
        let (fits, none) = (Ok(MAX_UNPACKED / 4), Err(Reason::TooLarge));
        assert_eq!(opened.collect::<Vec<_>>(), [fits, fits, fits, fits, none, none]);
        assert_eq!(budget.open(TEXT).unwrap(), TEXT, "what is not packed is not unpacked");
        let (budget, body) = (Budget::default(), format!("[{}0]", "0,".repeat(shape::MAX_VALUES / 2)));
        assert!(budget.open(body.as_bytes()).is_ok());
        assert_eq!(budget.open(body.as_bytes()).unwrap_err().reason, Reason::TooManyItems);
    }

    #[test]
    fn broken_data_and_bombs_are_refused() {
        for magic in [GZIP, ZSTD, LZ4] {
            assert_eq!(open(magic).unwrap_err().reason, Reason::BadCompression);
        }
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
