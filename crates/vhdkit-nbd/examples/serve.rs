//! Serves an image for reading and writing on a Unix socket until standard input ends.
//!
//! `cargo run -p vhdkit-nbd --example serve -- disk.vhdx /run/user/1000/disk.socket`

use std::error::Error;
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit_nbd::{Export, Listener, Options, Server};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(image), Some(socket)) = (arguments.first(), arguments.get(1)) else {
        return Err("usage: serve IMAGE SOCKET [--poll]".into());
    };
    let options = Options { poll: arguments.iter().any(|argument| argument == "--poll"), ..Options::default() };
    let image = Arc::new(OpenOptions::new().write(true).open_path(Path::new(image))?);
    let export = Export::new("", Arc::clone(&image) as Arc<dyn BlockDevice>)?.writable(true);
    let server = Server::new(vec![export], options)?;
    let handle = server.handle();
    let listener = UnixListener::bind(socket)?;
    let serving = std::thread::spawn(move || server.run(vec![Listener::Unix(listener)]));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    handle.stop();
    serving.join().map_err(|_| "the server panicked")??;
    println!("{:?}", handle.totals());
    std::fs::remove_file(socket)?;
    image.close()?;
    Ok(())
}
