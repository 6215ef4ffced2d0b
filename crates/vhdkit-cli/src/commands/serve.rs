//! `serve`: disks for NBD clients.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::time::Duration;

use serde_json::{Value, json};
use vhdkit::{Error, ErrorKind};
use vhdkit_nbd::{Options, Server, Tls};

use crate::args::{ServeArgs, TlsArgs};
use crate::cli::Context;
use crate::failure::{Answer, Failure, file_error};
use crate::serving::confinement::confine;
use crate::serving::disks::{Disks, Served, names};
use crate::serving::log;
use crate::serving::sockets::{Plan, Sockets};
use crate::serving::uri::Place;
use crate::serving::watch::{Signals, print_totals};
use crate::show;

/// Serves until a signal comes, or until nobody wants anything.
pub(crate) fn run(context: &Context, args: &ServeArgs) -> Result<Answer, Failure> {
    let names = names(args)?;
    log::install(&context.ui)?;
    let tls = tls(&args.tls)?;
    let plan = Plan::new(&args.address, tls.as_ref())?;
    let disks = Disks::open(context, args, names)?;
    let served = serve(context, args, &disks, tls, plan);
    let closed = disks.close();
    // A server is meant to be stopped by a signal: that is no failure, and hides none.
    context.interrupt.acknowledge();
    // What could not be made durable is worse news than a server that could not go on.
    closed.and(served)?;
    Ok(Answer::Yes)
}

fn serve(context: &Context, args: &ServeArgs, disks: &Disks<'_>, tls: Option<Tls>, plan: Plan) -> Result<(), Failure> {
    let system = |what: &'static str| move |error: io::Error| Failure::from(Error::io(what, error));
    let has_tls = tls.is_some();
    let exports = disks.served.iter().map(|served| served.export.clone()).collect();
    let server = Server::new(exports, options(args, tls))
        .map_err(|error| Failure::usage(error.to_string(), "choose other names, or fewer images"))?;
    let signals = Signals::catch().map_err(system("cannot handle signals"))?;
    let nowhere = OpenOptions::new().write(true).open("/dev/null").map_err(system("cannot open /dev/null"))?;
    let sockets = plan.listen()?;
    if let Some(path) = sockets.open_to_others().filter(|_| !args.address.insecure) {
        let what = "other users may connect to this socket; SocketMode=0600 in its unit keeps them out";
        context.ui.warn(Some(path), what);
    }
    let Sockets { listeners, places, made } = sockets;
    confine(&context.ui, made.as_ref());
    announce(context, &disks.served, &places, has_tls)?;
    // Whoever reads our output sees its end: `uri=$(vhdkit serve disk.vhdx &)` does not wait for the server's.
    rustix::stdio::dup2_stdout(&nowhere).map_err(|error| system("cannot close standard output")(error.into()))?;
    let handle = server.handle();
    let watch = signals.watch(context, handle.clone()).map_err(system("cannot start a thread"))?;
    let ran = server.run(listeners).map_err(system("cannot listen any more"));
    watch.end();
    drop(made);
    if context.ui.verbose {
        print_totals(&context.ui, &handle);
    }
    ran
}

fn options(args: &ServeArgs, tls: Option<Tls>) -> Options {
    Options {
        connections_max: args.max_connections.into(),
        tls,
        idle_exit: args.idle_exit.map(|seconds| Duration::from_secs(seconds.into())),
        poll: args.poll,
        ..Options::default()
    }
}

/// Certificate and key, where they are given.
fn tls(args: &TlsArgs) -> Result<Option<Tls>, Failure> {
    let (Some(certificate), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(None) };
    for file in [certificate, key].into_iter().chain(&args.tls_client_ca) {
        File::open(file).map_err(|error| file_error(file, "cannot be opened", error))?;
    }
    let tls = Tls::from_files(certificate, key, args.tls_client_ca.as_deref()).map_err(|error| {
        let error = Error::new(ErrorKind::InvalidArgument, error.to_string());
        error.with_hint(
            "name PEM files: the certificate with those that lead to its root, and its key without a password",
        )
    })?;
    Ok(Some(if args.tls_optional { tls.optional() } else { tls }))
}

/// Prints where the exports are found, before anybody can wait for it in vain.
fn announce(context: &Context, served: &[Served], places: &[Place], tls: bool) -> Result<(), Failure> {
    if places.contains(&Place::Unnamed) {
        context.ui.note("a socket that was handed over has no path, so that there is no URI for it");
    }
    let uris = |served: &Served| -> Vec<String> {
        places.iter().filter_map(|place| place.uri(served.export.name(), tls)).collect()
    };
    let mut out = context.ui.out();
    if context.ui.json {
        writeln!(out, "{}", announcement(served, places, uris))?;
    } else {
        for uri in served.iter().flat_map(uris) {
            writeln!(out, "{uri}")?;
        }
    }
    Ok(out.flush()?)
}

/// The same for scripts.
fn announcement(served: &[Served], places: &[Place], uris: impl Fn(&Served) -> Vec<String>) -> Value {
    let exports: Vec<Value> = served
        .iter()
        .map(|served| {
            json!({
                "name": served.export.name(),
                "uri": uris(served).first(),
                "uris": uris(served),
                "size": served.export.size(),
                "writable": served.export.is_writable(),
                "description": served.description,
            })
        })
        .collect();
    let socket = places.iter().find_map(|place| match place {
        Place::Unix(path) => Some(show::path(path)),
        _ => None,
    });
    let address = places.iter().find_map(|place| match place {
        Place::Tcp(address) => Some(address.to_string()),
        _ => None,
    });
    json!({
        "uri": served.first().and_then(|first| uris(first).into_iter().next()),
        "socket": socket,
        "listen": address,
        "exports": exports,
    })
}
