//! From token ids to text that can be sent: whole characters only, nothing of a stop string.
//!
//! The engine ends a sample that meets a stop string. Until then the string may be half there, so text that could be its
//! beginning is held back. What was sent is never taken back.

use tokio::sync::mpsc::UnboundedSender;

use crate::engine::{Completion, TextStream, first_stop, unsure_of};

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
    stream: TextStream,
    /// Text that may be the beginning of a stop string, or begins with one.
    held: String,
    /// Bytes that were sent.
    sent: usize,
    ended: bool,
}

/// Whether a request is still wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    GoOn,
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
        tail.held += &tail.stream.push(token.id, decode);
        let text = tail.release(&self.stop);
        self.send(Event::Token { sample, text, token })
    }

    /// Ends a sample and sends what was held back of its text.
    pub(crate) fn done(&mut self, sample: usize, completion: Completion) -> Wish {
        let tail = &mut self.samples[sample];
        tail.ended = true;
        let text = completion.text.get(tail.sent..).unwrap_or_default().to_string();
        let Completion { finish_reason: reason, stop_string, .. } = completion;
        self.send(Event::Done { sample, text, reason, stop_string })
    }

    /// Returns true once every sample has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.samples.iter().all(|tail| tail.ended)
    }

    /// Returns true where the connection is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    fn send(&self, event: Event) -> Wish {
        match self.events.send(event) {
            Ok(()) => Wish::GoOn,
            Err(_) => Wish::Gone,
        }
    }
}

impl Tail {
    /// Takes from the held text what is certain.
    fn release(&mut self, stop: &[String]) -> String {
        let certain = match first_stop(&self.held, stop) {
            Some((at, _)) => at,
            None => self.held.len() - unsure_of(&self.held, stop),
        };
        let rest = self.held.split_off(certain);
        self.sent += certain;
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::FinishReason;
    use tokio::sync::mpsc;

    /// A tokenizer whose token is one byte.
    fn bytes(ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn token(id: u8) -> Sampled {
        Sampled { id: u32::from(id), piece: String::new(), logprob: 0.0 }
    }

    fn completion(text: &str) -> Completion {
        let (token_ids, logprobs, sampler_logprobs) = (Vec::new(), Vec::new(), Vec::new());
        let (finish_reason, stop_string, text) = (FinishReason::Stop, None, text.to_string());
        Completion { token_ids, logprobs, sampler_logprobs, finish_reason, stop_string, text }
    }

    /// Sends `text` byte by byte, then ends it as `whole`; returns the pieces that were emitted.
    fn emit(text: &str, stop: &[&str], whole: &str) -> Vec<String> {
        let (events, mut received) = mpsc::unbounded_channel();
        let mut emitter = Emitter::new(events, 1, stop.iter().map(|s| s.to_string()).collect());
        for byte in text.bytes() {
            assert_eq!(emitter.token(0, token(byte), &bytes), Wish::GoOn);
        }
        emitter.done(0, completion(whole));
        assert!(emitter.is_over());
        let mut pieces = Vec::new();
        while let Ok(event) = received.try_recv() {
            match event {
                Event::Token { text, .. } | Event::Done { text, .. } => pieces.push(text),
                _ => {}
            }
        }
        pieces
    }

    #[test]
    fn a_character_is_sent_whole() {
        assert_eq!(emit("aé", &[], "aé"), ["a", "", "é", ""]);
    }

    #[test]
    fn an_unfinished_character_is_sent_at_the_end() {
        let (events, mut received) = mpsc::unbounded_channel();
        let mut emitter = Emitter::new(events, 1, Vec::new());
        emitter.token(0, token(0xC3), &bytes);
        emitter.done(0, completion("\u{FFFD}"));
        assert!(matches!(received.try_recv(), Ok(Event::Token { text, .. }) if text.is_empty()));
        assert!(matches!(received.try_recv(), Ok(Event::Done { text, .. }) if text == "\u{FFFD}"));
    }

    #[test]
    fn nothing_of_a_stop_string_is_sent() {
        assert_eq!(emit("ab END", &[" END"], "ab").concat(), "ab");
        assert_eq!(emit("one two", &["three", "two"], "one ").concat(), "one ");
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_only_held_back() {
        let pieces = emit("ab EN cd E", &[" END", "zz"], "ab EN cd E");
        assert_eq!(pieces.concat(), "ab EN cd E");
        assert_eq!(pieces[2..5], ["", "", ""], "held until the next letter decides");
    }

    #[test]
    fn a_closed_connection_is_noticed() {
        let (events, received) = mpsc::unbounded_channel();
        drop(received);
        let mut emitter = Emitter::new(events, 1, Vec::new());
        assert_eq!(emitter.token(0, token(65), &bytes), Wish::Gone);
    }
}
