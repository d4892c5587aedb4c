//! What tests of scorers share: answers to score, and servers that say what they are told to.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use serde_json::Value;

use super::Item;
use crate::record::{FinishReason, Message};

/// A server that gives one canned answer a connection, in order, the last one for ever, and tells what it was asked.
pub(super) struct Server {
    pub(super) url: String,
    pub(super) asked: mpsc::Receiver<(String, Value)>,
}

pub(super) fn serve(answers: &[&str]) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers: Vec<String> = answers.iter().map(|a| a.to_string()).collect();
    let (sender, asked) = mpsc::channel();
    std::thread::spawn(move || {
        for (at, stream) in listener.incoming().enumerate() {
            let (mut stream, answer) = (stream.unwrap(), &answers[at.min(answers.len() - 1)]);
            let request = request(&mut stream);
            if sender.send(request).is_err() {
                return;
            }
            // A broken pipe is the client's business.
            drop(stream.write_all(answer.as_bytes()));
        }
    });
    Server { url, asked }
}

/// Reads one request: its first line and its body.
fn request(stream: &mut TcpStream) -> (String, Value) {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.to_lowercase().lines().find_map(|l| l.strip_prefix("content-length: ")?.parse::<usize>().ok());
            if body.len() >= length.unwrap() {
                assert!(head.to_lowercase().contains("x-taod-internal: 1"), "{head}");
                return (head.lines().next().unwrap().to_string(), serde_json::from_str(body).unwrap());
            }
        }
        let read = stream.read(&mut piece).unwrap();
        assert!(read > 0, "the request ended early: {text}");
        bytes.extend_from_slice(&piece[..read]);
    }
}

pub(super) fn ok(body: &str) -> String {
    respond("200 OK", body)
}

pub(super) fn respond(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

/// Returns answers to questions.
pub(super) fn items(answers: &[(&str, &str)]) -> Vec<Item> {
    let item = |(question, answer): &(&str, &str)| Item {
        workload: Some("shop".into()),
        messages: vec![Message::text("user", *question)],
        response: answer.to_string(),
        finish_reason: FinishReason::Stop,
        prompt_ids: None,
        token_ids: None,
        ratings: Vec::new(),
    };
    answers.iter().map(item).collect()
}
