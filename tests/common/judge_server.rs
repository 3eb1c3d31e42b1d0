//! A judge on the loopback address that gives fixed replies.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;

/// Serves these replies (status, body), one for each connection. Returns the URL, and the requests as they arrive.
pub fn serve(replies: Vec<(u16, String)>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for (status, body) in replies {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = sender.send(request(&mut stream));
            respond(&mut stream, status, &body);
        }
    });
    (url, receiver)
}

/// Serves so many groups of requests that are open at one time; `reply` gives the body for a request.
pub fn serve_together(groups: usize, size: usize, reply: impl Fn(&str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    thread::spawn(move || {
        for _ in 0..groups {
            let mut open: Vec<TcpStream> = (0..size).map(|_| listener.accept().unwrap().0).collect();
            let bodies: Vec<String> = open.iter_mut().map(|stream| reply(&request(stream))).collect();
            open.iter_mut().zip(bodies).for_each(|(stream, body)| respond(stream, 200, &body));
        }
    });
    url
}

fn request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer).unwrap_or(0);
        request.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&request).to_lowercase();
        let length = |head: &str| {
            let at = head.find("content-length:")?;
            head[at + 15..].split_whitespace().next()?.parse::<usize>().ok()
        };
        let whole = text.find("\r\n\r\n").is_some_and(|at| {
            text.contains("transfer-encoding: chunked") && text.ends_with("0\r\n\r\n")
                || length(&text[..at]).is_some_and(|n| request.len() >= at + 4 + n)
        });
        if n == 0 || whole {
            return String::from_utf8_lossy(&request).into_owned();
        }
    }
}

fn respond(stream: &mut TcpStream, status: u16, body: &str) {
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

/// A chat completion that says this.
pub fn reply(text: &str) -> String {
    serde_json::json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string()
}
