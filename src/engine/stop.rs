//! The text of tokens as they come, and the strings that end it.
//!
//! A token may hold half a character, and a stop string may be spread over several tokens or end inside one. So text is told
//! only where it is certain, and an answer that met a stop string keeps the ids of all its tokens: they are what was
//! drawn. Its text is that of its ids before the first stop string.

use super::error::EngineError;

/// Turns tokens into text, one at a time.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// Tokens that are decoded together with the next one, because a tokenizer may put white space between tokens.
    ids: Vec<u32>,
    /// Those of them whose text was told.
    told: usize,
}

impl TextStream {
    /// Adds a token and returns the text that became certain with it: whole characters only. `decode` is the
    /// tokenizer's text of some ids without special tokens.
    pub fn push(&mut self, id: u32, decode: &dyn Fn(&[u32]) -> String) -> String {
        self.ids.push(id);
        let known = decode(&self.ids[..self.told]);
        let mut now = decode(&self.ids);
        if now.len() <= known.len() || now.ends_with('\u{FFFD}') {
            return String::new();
        }
        self.ids.drain(..self.told);
        self.told = self.ids.len();
        match now.is_char_boundary(known.len()) {
            true => now.split_off(known.len()),
            false => String::new(),
        }
    }

    /// Returns the text that is not certain yet; an unfinished character is U+FFFD.
    pub fn rest(&self, decode: &dyn Fn(&[u32]) -> String) -> String {
        if self.told == self.ids.len() {
            return String::new();
        }
        let known = decode(&self.ids[..self.told]).len();
        decode(&self.ids).get(known..).unwrap_or_default().to_string()
    }
}

/// Returns where the first of some stop strings begins in a text, and which one it is.
pub fn first_stop<'a>(text: &str, stop: &'a [String]) -> Option<(usize, &'a str)> {
    stop.iter().filter_map(|stop| Some((text.find(stop.as_str())?, stop.as_str()))).min_by_key(|(at, _)| *at)
}

/// Returns how many bytes at the end of a text may be the beginning of a stop string.
pub fn unsure_of(text: &str, stop: &[String]) -> usize {
    let starts = |stop: &str| {
        let lengths = stop.char_indices().map(|(at, _)| at).skip(1);
        lengths.filter(|at| text.ends_with(&stop[..*at])).max()
    };
    stop.iter().filter_map(|stop| starts(stop)).max().unwrap_or(0)
}

/// Refuses a stop string that would end every answer at once.
pub(crate) fn check(stop: &[String]) -> Result<(), EngineError> {
    match stop.iter().any(String::is_empty) {
        true => Err(EngineError::request("stop holds an empty string, which stands in every text; leave it out")),
        false => Ok(()),
    }
}

/// Looks for stop strings in a growing answer without decoding all of it at each token.
#[derive(Debug, Default)]
pub(crate) struct StopWatch {
    stream: TextStream,
    /// The end of the text, as long as a stop string less its last byte.
    tail: String,
}

impl StopWatch {
    /// Begins an answer; nothing where no string ends it.
    pub(crate) fn begin(stop: &[String]) -> Option<Self> {
        (!stop.is_empty()).then(StopWatch::default)
    }

    /// Takes a token; true where the text seems to hold a stop string now.
    pub(crate) fn met(&mut self, id: u32, stop: &[String], decode: &dyn Fn(&[u32]) -> String) -> bool {
        self.tail += &self.stream.push(id, decode);
        let certain = self.tail.len();
        self.tail += &self.stream.rest(decode);
        let met = first_stop(&self.tail, stop).is_some();
        self.tail.truncate(certain);
        let longest = stop.iter().map(String::len).max().unwrap_or(0);
        let keep = (certain.saturating_sub(longest)..=certain).find(|at| self.tail.is_char_boundary(*at));
        self.tail.drain(..keep.unwrap_or(certain));
        met
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer whose token is one byte.
    fn bytes(ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn owned(stop: &[&str]) -> Vec<String> {
        stop.iter().map(|s| s.to_string()).collect()
    }

    /// Returns after how many bytes of a text a stop string is met.
    fn met(text: &str, stop: &[&str]) -> Option<usize> {
        let (stop, mut watch) = (owned(stop), StopWatch::default());
        text.bytes().position(|byte| watch.met(u32::from(byte), &stop, &bytes)).map(|at| at + 1)
    }

    #[test]
    fn text_comes_in_whole_characters_and_whole() {
        let mut stream = TextStream::default();
        let pieces: Vec<String> = "aé€b".bytes().map(|byte| stream.push(u32::from(byte), &bytes)).collect();
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "b"]);
        stream.push(0xC3, &bytes);
        assert_eq!(stream.rest(&bytes), "\u{FFFD}");
    }

    #[test]
    fn white_space_between_tokens_is_not_lost() {
        // As tokenizers of words decode: the first of a text has no space before it.
        let words = |ids: &[u32]| ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
        let mut stream = TextStream::default();
        let text: String = [1, 2, 3].iter().map(|id| stream.push(*id, &words)).collect();
        assert_eq!(text, "w1 w2 w3");
    }

    #[test]
    fn a_stop_string_is_met_across_tokens_as_soon_as_it_stands_there() {
        assert_eq!(met("one END two", &[" END"]), Some(7));
        assert_eq!(met("eeEND", &["eEND", "zz"]), Some(5));
        assert_eq!(met("ab EN D", &["END"]), None);
        assert_eq!(met("a€uro!", &["€u"]), Some(5), "a character of three bytes");
    }

    #[test]
    fn the_first_of_several_counts_and_what_may_become_one_is_told() {
        let stop = owned(&["three", "two"]);
        assert_eq!(first_stop("one two three", &stop), Some((4, "two")));
        assert_eq!((unsure_of("one th", &stop), unsure_of("one tt", &stop), unsure_of("one ", &stop)), (2, 1, 0));
        assert_eq!(unsure_of("a€", &owned(&["€u"])), 3);
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        assert!(check(&owned(&["a", ""])).unwrap_err().to_string().contains("stop holds an empty string"));
    }
}
