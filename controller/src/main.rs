//! `mote-controller`: see `--help`.

use std::{
    env,
    fs::{File, OpenOptions, TryLockError},
    io::IsTerminal,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use mote_controller::{
    app::{self, App},
    config::{Config, DEFAULT_TOKEN_LIFETIME_S, KEEP_DELETED, Keys, LOGIN_RATE, Lockout},
    db,
    hosts::{DEFAULT_TOKEN_LIFETIME, TokenWish, make_join_token},
    http::limits::Rate,
    identity::bootstrap,
    image, server,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// Where `bootstrap` finds the administrator's password: arguments can be seen by every user of the machine.
const PASSWORD_VARIABLE: &str = "MOTE_ADMIN_PASSWORD";

/// Mote's controller: identity, image, compute and network APIs of a whole cloud in one program and one port.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the APIs until SIGTERM.
    Run(Run),
    /// Make the administrator, the default domain and the built-in roles, and print the credentials as JSON.
    ///
    /// Can be repeated: what is there stays. The password is read from the environment variable MOTE_ADMIN_PASSWORD;
    /// without it, a random one is made and printed.
    Bootstrap(Bootstrap),
    /// Make a token with which hosts can join, and print it.
    ///
    /// For `mote-hostd join URL --token TOKEN`. Works also while the controller runs.
    JoinToken(JoinToken),
}

#[derive(Debug, Args)]
struct Common {
    /// Directory of the database, the keys and the images' bytes.
    #[arg(long, default_value = "/var/lib/mote/controller", env = "MOTE_CONTROLLER_STATE_DIR")]
    state_dir: PathBuf,
    /// PostgreSQL 15 or newer in place of SQLite in the state directory: postgres://user:password@host/database.
    ///
    /// Several controllers may share one. Better given by the environment: arguments can be seen by every user.
    #[arg(long, value_name = "URL", env = "MOTE_DATABASE", hide_env_values = true)]
    database: Option<String>,
}

impl Common {
    fn config(&self, listen: SocketAddr, public_url: &str) -> anyhow::Result<Config> {
        let mut config = Config::new(listen, self.state_dir.clone(), public_url)?;
        config.database.clone_from(&self.database);
        Ok(config)
    }
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    common: Common,
    /// Address and port to serve HTTP on.
    #[arg(long, default_value = "127.0.0.1:8774")]
    listen: SocketAddr,
    /// How clients reach this controller, the base of all URLs in the catalog [default: http://LISTEN, or https://LISTEN].
    #[arg(long)]
    public_url: Option<String>,
    /// Lifetime of tokens, in seconds.
    #[arg(long, default_value_t = DEFAULT_TOKEN_LIFETIME_S)]
    token_lifetime: u64,
    /// After so many failed log-ins in a row a user is locked out for a while; 0 for never.
    #[arg(long, default_value_t = Lockout::default().attempts)]
    lockout_attempts: u32,
    /// For how long, in seconds.
    #[arg(long, default_value_t = Lockout::default().duration.as_secs())]
    lockout_seconds: u64,
    /// Log-ins that an address may try per second in the long run, ten times as many at once; 0 for no limit.
    #[arg(long, default_value_t = LOGIN_RATE.per_second)]
    login_rate: u32,
    /// Requests that a project may make per second in the long run, ten times as many at once; 0 for no limit.
    #[arg(long, default_value_t = 0)]
    project_rate: u32,
    /// A bucket for images' bytes, which all controllers share, in place of files in the state directory:
    /// s3://BUCKET[/PREFIX]?endpoint=https://HOST[:PORT][&region=REGION].
    ///
    /// Any S3-compatible service. The keys are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. The prefix must be this
    /// cloud's alone: what the cloud doesn't know is removed from it.
    #[arg(long, value_name = "URL", env = "MOTE_IMAGE_STORE")]
    image_store: Option<String>,
    /// A web server (HOST or HOST:PORT) from which images may be imported by web-download; can be repeated.
    ///
    /// Name only servers that any tenant may reach through this machine. Without one the method is off.
    #[arg(long, value_name = "HOST", env = "MOTE_IMAGE_DOWNLOAD_HOSTS", value_delimiter = ',')]
    image_download_host: Vec<String>,
    /// Certificate chain in PEM: HTTPS in place of HTTP.
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate in PEM.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Shortest new password, in characters.
    #[arg(long, default_value_t = 1)]
    password_min_chars: usize,
    /// For how many days deleted servers are shown in lists of changes and to admins; 0: not at all.
    #[arg(long, default_value_t = KEEP_DELETED.as_secs() / 86_400, value_parser = clap::value_parser!(u64).range(..=36_500))]
    keep_deleted_days: u64,
}

#[derive(Debug, Args)]
struct Bootstrap {
    #[command(flatten)]
    common: Common,
    /// How clients will reach the controller, for the printed auth_url.
    #[arg(long, default_value = "http://127.0.0.1:8774")]
    public_url: String,
    /// Set the password also if the administrator exists, and enable that user.
    #[arg(long)]
    reset_password: bool,
}

#[derive(Debug, Args)]
struct JoinToken {
    #[command(flatten)]
    common: Common,
    /// How many hosts may join with it [default: any number].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    uses: Option<u32>,
    /// How long it can be used, in seconds.
    #[arg(long, default_value_t = DEFAULT_TOKEN_LIFETIME.as_secs())]
    lifetime: u64,
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,sqlx=warn".into()),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let outcome =
        tokio::runtime::Runtime::new().context("can't start the async runtime").and_then(|runtime| {
            runtime.block_on(async {
                match cli.command {
                    Command::Run(args) => run(args).await,
                    Command::Bootstrap(args) => bootstrap(args).await,
                    Command::JoinToken(args) => join_token(args).await,
                }
            })
        });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mote-controller: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn run(args: Run) -> anyhow::Result<()> {
    // First, so that a signal during the start ends it in order as well.
    let stop = stop_signal()?;
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(server::tls(certificate, key)?),
        _ => None,
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let public_url = args.public_url.unwrap_or_else(|| format!("{scheme}://{}", args.listen));
    let mut config = args.common.config(args.listen, &public_url)?;
    config.token_lifetime_s = args.token_lifetime;
    config.lockout =
        Lockout { attempts: args.lockout_attempts, duration: Duration::from_secs(args.lockout_seconds) };
    config.password_min_chars = args.password_min_chars;
    config.keep_deleted = Duration::from_secs(args.keep_deleted_days * 86_400);
    let keys = env::var("AWS_ACCESS_KEY_ID").ok().zip(env::var("AWS_SECRET_ACCESS_KEY").ok());
    config.image_store = args.image_store.map(|address| (address, keys.map(Keys)));
    config.image_download_hosts = args.image_download_host;
    let rate = |per_second: u32| Rate { per_second, burst: per_second.saturating_mul(10) };
    config.login_rate = rate(args.login_rate);
    config.project_rate = rate(args.project_rate);
    let listener = TcpListener::bind(args.listen).await.with_context(|| {
        format!("can't listen on {} (another program may be using the port)", args.listen)
    })?;
    let _lock = lock_state_dir(&config.state_dir)?;
    let app = App::open(config).await?;
    image::blobs::recover(&app).await.context("can't bring the image store in order")?;
    tracing::info!(listen = %args.listen, public_url, "serving");
    server::serve(listener, tls, app::router(app), stop).await;
    Ok(())
}

/// One `run` per state directory. (`bootstrap` and `join-token` may work beside it: they only write to the database.)
fn lock_state_dir(dir: &Path) -> anyhow::Result<File> {
    db::create_private_dir(dir)?;
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    let file = options.open(&path).with_context(|| format!("can't open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another mote-controller is running in {}", dir.display()),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("can't lock {}", path.display()))
        }
    }
}

async fn bootstrap(args: Bootstrap) -> anyhow::Result<()> {
    let listen = ([127, 0, 0, 1], 8774).into();
    let app = App::open(args.common.config(listen, &args.public_url)?).await?;
    let password = match env::var(PASSWORD_VARIABLE) {
        Ok(password) => Some(password),
        Err(env::VarError::NotPresent) => None,
        Err(error) => return Err(error).context(PASSWORD_VARIABLE),
    };
    let credentials = bootstrap::bootstrap(&app, password, args.reset_password).await?;
    println!("{}", serde_json::to_string_pretty(&credentials)?);
    Ok(())
}

/// Only writes a row: the controller that may be running finds it there.
async fn join_token(args: JoinToken) -> anyhow::Result<()> {
    let dir = &args.common.state_dir;
    let database = args.common.database.as_deref();
    if database.is_none() && !dir.join(db::SQLITE_FILE).is_file() {
        bail!("there is no database of a controller in {} (wrong --state-dir?)", dir.display());
    }
    let pools = db::open(dir, database).await?;
    let wish = TokenWish {
        description: "made by mote-controller join-token".into(),
        uses: args.uses,
        lifetime: Duration::from_secs(args.lifetime),
    };
    let mut tx = db::begin_immediate(&pools.write).await.context("can't write to the database")?;
    let made = make_join_token(&mut tx, &wish).await?;
    tx.commit().await.context("can't write to the database")?;
    println!("{}", made.token);
    Ok(())
}

/// Resolves at SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate()).context("can't watch for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("can't watch for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("stopping");
    })
}
