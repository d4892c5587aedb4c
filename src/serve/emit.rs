//! From token ids to text that can be sent: whole characters only, nothing of a stop string.
//!
//! A token may hold half a character, and a stop string may be spread over several tokens, so text is held back until
//! it is certain. What was sent is never taken back.

use tokio::sync::mpsc::UnboundedSender;

use crate::record::FinishReason;

use super::api::Sampled;
use super::job::Event;

/// Turns the tokens of one request's samples into events for the connection that waits for them.
pub(crate) struct Emitter {
    events: UnboundedSender<Event>,
    stop: Vec<String>,
    samples: Vec<Tail>,
}

/// The end of one sample's text that is not certain yet.
#[derive(Default)]
struct Tail {
    ids: Vec<u32>,
    /// Tokens before this are certain; those from here to `read` are decoded again with the next one, because a
    /// tokenizer may put white space between tokens.
    prefix: usize,
    read: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
    ended: bool,
}

/// Whether a sample is still wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    GoOn,
    /// It met a stop string, or it had ended before.
    Ended,
    /// Nobody listens any more.
    Gone,
}

impl Emitter {
    /// Emits to `events` for `samples` samples, each ended by any of `stop`.
    pub(crate) fn new(events: UnboundedSender<Event>, samples: usize, stop: Vec<String>) -> Self {
        Emitter { events, stop, samples: (0..samples).map(|_| Tail::default()).collect() }
    }

    /// Takes one token of a sample; `decode` is the tokenizer's text of some ids without special tokens.
    pub(crate) fn token(&mut self, sample: usize, token: Sampled, decode: &dyn Fn(&[u32]) -> String) -> Wish {
        let tail = &mut self.samples[sample];
        if tail.ended {
            return Wish::Ended;
        }
        tail.push(token.id, decode);
        let (text, stopped) = tail.release(&self.stop);
        let sent = self.events.send(Event::Token { sample, text, token });
        if sent.is_err() {
            return Wish::Gone;
        }
        match stopped {
            true => self.end(sample, String::new(), FinishReason::Stop),
            false => Wish::GoOn,
        }
    }

    /// Ends a sample with why its engine stopped; sends what was held back.
    pub(crate) fn done(&mut self, sample: usize, reason: FinishReason, decode: &dyn Fn(&[u32]) -> String) -> Wish {
        let tail = &mut self.samples[sample];
        if tail.ended {
            return Wish::Ended;
        }
        let text = tail.rest(decode);
        self.end(sample, text, reason)
    }

    /// Returns true once every sample has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.samples.iter().all(|tail| tail.ended)
    }

    /// Returns true where the connection is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    fn end(&mut self, sample: usize, text: String, reason: FinishReason) -> Wish {
        self.samples[sample].ended = true;
        match self.events.send(Event::Done { sample, text, reason }) {
            Ok(()) => Wish::Ended,
            Err(_) => Wish::Gone,
        }
    }
}

impl Tail {
    /// Adds a token; whole characters that it completes go to the held text.
    fn push(&mut self, id: u32, decode: &dyn Fn(&[u32]) -> String) {
        self.ids.push(id);
        let known = decode(&self.ids[self.prefix..self.read]);
        let now = decode(&self.ids[self.prefix..]);
        if now.len() > known.len() && !now.ends_with('\u{FFFD}') {
            self.held.push_str(now.get(known.len()..).unwrap_or_default());
            self.prefix = self.read;
            self.read = self.ids.len();
        }
    }

    /// Takes from the held text what is certain; true where a stop string was met (what follows it is dropped).
    fn release(&mut self, stop: &[String]) -> (String, bool) {
        if let Some(at) = stop.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Takes all text that is left, an unfinished character included.
    fn rest(&mut self, decode: &dyn Fn(&[u32]) -> String) -> String {
        let known = decode(&self.ids[self.prefix..self.read]);
        let now = decode(&self.ids[self.prefix..]);
        let mut text = std::mem::take(&mut self.held);
        text.push_str(now.get(known.len()..).unwrap_or_default());
        text
    }
}

/// Returns how many bytes at the end of `text` are a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).skip(1);
    starts.filter(|&at| text.ends_with(&stop[..at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    /// A tokenizer whose token is one byte.
    fn bytes(ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends `text` byte by byte; returns the pieces that were emitted and the wish after the last token.
    fn emit(text: &str, stop: &[&str]) -> (Vec<String>, Wish) {
        let (events, mut received) = mpsc::unbounded_channel();
        let mut emitter = Emitter::new(events, 1, stop.iter().map(|s| s.to_string()).collect());
        let mut wish = Wish::GoOn;
        for byte in text.bytes() {
            let token = Sampled { id: u32::from(byte), piece: String::new(), logprob: 0.0 };
            wish = emitter.token(0, token, &bytes);
            if wish != Wish::GoOn {
                break;
            }
        }
        emitter.done(0, FinishReason::Length, &bytes);
        let mut pieces = Vec::new();
        while let Ok(event) = received.try_recv() {
            match event {
                Event::Token { text, .. } | Event::Done { text, .. } => pieces.push(text),
                _ => {}
            }
        }
        (pieces, wish)
    }

    #[test]
    fn a_character_is_sent_whole() {
        let (pieces, _) = emit("aé", &[]);
        assert_eq!(pieces, ["a", "", "é", ""]);
    }

    #[test]
    fn an_unfinished_character_is_sent_at_the_end() {
        let (events, mut received) = mpsc::unbounded_channel();
        let mut emitter = Emitter::new(events, 1, Vec::new());
        emitter.token(0, Sampled { id: 0xC3, piece: String::new(), logprob: 0.0 }, &bytes);
        emitter.done(0, FinishReason::Length, &bytes);
        assert!(matches!(received.try_recv(), Ok(Event::Token { text, .. }) if text.is_empty()));
        assert!(matches!(received.try_recv(), Ok(Event::Done { text, .. }) if text == "\u{FFFD}"));
        assert!(emitter.is_over());
    }

    #[test]
    fn nothing_of_a_stop_string_is_sent() {
        let (pieces, wish) = emit("ab END cd", &[" END"]);
        assert_eq!((pieces.concat().as_str(), wish), ("ab", Wish::Ended));
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_only_held_back() {
        let (pieces, _) = emit("ab EN cd E", &[" END", "zz"]);
        assert_eq!(pieces.concat(), "ab EN cd E");
        assert_eq!(pieces[2..5], ["", "", ""], "held until the next letter decides");
    }

    #[test]
    fn the_first_of_several_stop_strings_counts() {
        let (pieces, _) = emit("one two three", &["three", "two"]);
        assert_eq!(pieces.concat(), "one ");
    }

    #[test]
    fn a_closed_connection_is_noticed() {
        let (events, received) = mpsc::unbounded_channel();
        drop(received);
        let mut emitter = Emitter::new(events, 1, Vec::new());
        let token = Sampled { id: 65, piece: String::new(), logprob: 0.0 };
        assert_eq!(emitter.token(0, token, &bytes), Wish::Gone);
    }
}
