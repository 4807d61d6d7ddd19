"""What conf/aws and its README say: the stack, its roles, instance metadata, the GRANTs.

The stack is created in moto, through CloudFormation. Moto has no instance metadata and ignores the
resources that policies name, so these two are played here, by `Metadata` and `Gateway`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import random
import re
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import cfnlint
import pytest
import urllib3
import yaml
from moto.core.common_models import CloudFormationModel
from moto.secretsmanager.models import secretsmanager_backends
from moto.secretsmanager.utils import random_password

from helpers import assert_failed, forward, loaded
from sandbox import (
    DATABASE,
    REGION,
    ROOT,
    SAMPLE,
    SECRET,
    Handler,
    LocalServer,
    Sandbox,
    Source,
    answer,
)
from sequra_challenge import main

STACK = ROOT / "conf" / "aws" / "stack.yaml"
TEMPLATE: Any = cfnlint.decode.decode_str(STACK.read_text("utf-8"))[0]
README = (STACK.parent / "README.md").read_text("utf-8")
DEPLOY = yaml.safe_load((ROOT / ".github" / "workflows" / "deploy.yml").read_text("utf-8"))
KEY = f"arn:aws:kms:{REGION}:123456789012:key/1c5d1b9e-0000-4000-8000-9d1b6cfb9f1f"
USER = "etl"


class Server(LocalServer):
    """An HTTP server on loopback; use it as a context manager."""

    def __init__(self, handle: Callable[[BaseHTTPRequestHandler, bytes], None]) -> None:
        class Handles(Handler):
            protocol_version = "HTTP/1.1"  # or botocore waits for the answer to its Expect header

            def do_GET(self) -> None:
                handle(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        super().__init__(Handles)


# --- instance metadata --------------------------------------------------------------------------


class Metadata(Server):
    """Metadata of an instance, by IMDSv2; the first answer takes longer than botocore's second."""

    def __init__(self, credentials: dict[str, Any]) -> None:
        super().__init__(self.handle)
        self.delays = itertools.chain([1.5], itertools.repeat(0.0))
        shown = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "LastUpdated": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "AccessKeyId": credentials["AccessKeyId"],
            "SecretAccessKey": credentials["SecretAccessKey"],
            "Token": credentials["SessionToken"],
            "Expiration": f"{datetime.now(UTC) + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}",
        }
        self.documents = {
            "/latest/meta-data/placement/availability-zone/": f"{REGION}b",
            "/latest/meta-data/iam/security-credentials/": "loader",
            "/latest/meta-data/iam/security-credentials/loader": json.dumps(shown),
        }

    def handle(self, request: BaseHTTPRequestHandler, _: bytes) -> None:
        time.sleep(next(self.delays))
        document = self.documents.get(request.path)
        if request.command == "PUT" and request.path == "/latest/api/token":
            lifetime = request.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            answer(request, 200 if 1 <= int(lifetime) <= 21600 else 400, b"t0ken")
        elif request.headers["X-aws-ec2-metadata-token"] != "t0ken":
            answer(request, 401)
        else:
            answer(request, 200 if document else 404, (document or "").encode())


# --- IAM ----------------------------------------------------------------------------------------


class Gateway(Server):
    """Stands before moto, and lets pass what the policies of the request's role allow.

    ``used`` has the actions that each role was allowed, for S3 tells the region of a bucket also to
    whom it denies HeadBucket; ``broken`` tells which requests fail all the same.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(self.handle)
        self.stack = stack
        self.used: dict[str, set[str]] = {"InstanceRole": set(), "CopyRole": set()}
        self.broken: Callable[[str], bool] = lambda path: False
        self.pool = urllib3.PoolManager()

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        name = re.findall(r"Credential=(\w+)/", request.headers["Authorization"])[0]
        role = next((r for r in self.used if self.stack.keys[r]["AccessKeyId"] == name), "")
        if not role or (
            request.headers["X-Amz-Security-Token"] != self.stack.keys[role]["SessionToken"]
        ):
            answer(request, 403, b"InvalidClientTokenId")
            return
        for action, resource in self.needed(request, body):
            if not self.stack.allows(role, action, resource):
                self.deny(request, f"{role} is not authorized to perform: {action} on {resource}")
                return
            self.used[role].add(action)
        if self.broken(request.path):
            self.deny(request, "broken by the test")
            return
        forward(request, self.pool, self.stack.sandbox.aws, body)

    def needed(self, request: BaseHTTPRequestHandler, body: bytes) -> Iterator[tuple[str, str]]:
        """The actions that a request needs, each with the resource that it needs it on."""
        service = re.findall(
            r"Credential=[^,]*/([\w-]+)/aws4_request", request.headers["Authorization"]
        )
        key = request.headers["X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id"]
        match service[0]:
            case "s3":
                url = urlsplit(request.path)
                bucket, _, name = url.path[1:].partition("/")
                query = parse_qs(url.query, keep_blank_values=True)
                resource = f"arn:aws:s3:::{bucket}/{name}" if name else f"arn:aws:s3:::{bucket}"
                action = {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}.get(
                    request.command, "PutObject"
                )
                if not name:
                    action = "ListBucket" if request.command in ("GET", "HEAD") else "CreateBucket"
                elif request.command == "DELETE" and "uploadId" in query:
                    action = "AbortMultipartUpload"
                yield f"s3:{action}", resource
                if key:
                    yield "kms:GenerateDataKey", key
                # To read what is encrypted with a key, and to join its parts, it is decrypted.
                if self.stack.key and (action == "GetObject" or (key and "uploads" in query)):
                    yield "kms:Decrypt", self.stack.key
            case "secretsmanager":
                action = request.headers["X-Amz-Target"].partition(".")[2]
                yield (
                    f"secretsmanager:{action}",
                    self.stack.secret_arn(json.loads(body)["SecretId"]),
                )
                if self.stack.key:
                    yield "kms:Decrypt", self.stack.key
            case "sns":
                query = parse_qs(body.decode())
                yield f"sns:{query['Action'][0]}", query["TopicArn"][0]
            case "sts":
                assert b"Action=GetCallerIdentity" in body  # which nobody needs a policy for
            case other:
                yield f"{other}:?", "*"

    def deny(self, request: BaseHTTPRequestHandler, message: str) -> None:
        """403, as S3 says it or as the services that speak JSON do."""
        if request.headers["X-Amz-Target"]:
            text = json.dumps({"__type": "AccessDeniedException", "Message": message})
            answer(request, 400, text.encode(), Content_Type="application/x-amz-json-1.1")
        else:
            error = f"<Code>AccessDenied</Code><Message>{message}</Message>"
            answer(request, 403, f"<Error>{error}</Error>".encode(), Content_Type="text/xml")


def covers(statement: dict[str, Any], action: str, resource: str) -> bool:
    """Whether a policy's statement is about this action on this resource."""
    return all(
        any(fnmatchcase(text, pattern) for pattern in as_list(statement[part]))
        for part, text in (("Action", action), ("Resource", resource))
    )


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# --- the stack ----------------------------------------------------------------------------------


POLICIES: dict[str, Any] = {}  # of buckets, by their names
PROVIDERS: list[str] = []  # their URLs
MADE_PROVIDER = "arn:aws:iam::123456789012:oidc-provider/made"


def teach(
    kind: str, module: str, create: Callable[[str, Any, str, str], str]
) -> type[CloudFormationModel]:
    """Lets moto's CloudFormation make a kind of resource that it does not know, and give its id."""

    class Model(CloudFormationModel):
        __module__ = f"moto.{module}.models"  # from which moto tells the service
        physical_resource_id = ""

        @staticmethod
        def cloudformation_name_type() -> str:
            return "Name"

        @staticmethod
        def cloudformation_type() -> str:
            return kind

        @classmethod
        def create_from_cloudformation_json(
            cls,
            resource_name: str,
            cloudformation_json: Any,
            account_id: str,
            region_name: str,
            **_: Any,
        ) -> Model:
            made, properties = cls(), cloudformation_json["Properties"]
            made.physical_resource_id = create(resource_name, properties, account_id, region_name)
            return made

    return Model


def make_secret(name: str, properties: Any, account_id: str, region_name: str) -> str:
    text = properties.get("SecretString")
    if generate := properties.get("GenerateSecretString"):
        without = ("Characters", "Numbers", "Punctuation", "Uppercase", "Lowercase")
        password = random_password(  # type: ignore[misc]
            generate["PasswordLength"],
            *(generate.get(f"Exclude{what}", "") for what in without),
            include_space=False,
            require_each_included_type=True,
        )
        values = json.loads(generate["SecretStringTemplate"])
        text = json.dumps(values | {generate["GenerateStringKey"]: password})
    made = secretsmanager_backends[account_id][region_name].create_secret(
        name, text, None, None, [], properties.get("KmsKeyId"), None, [], False
    )
    return str(json.loads(made)["ARN"])


def make_policy(_name: str, properties: Any, *_: str) -> str:
    POLICIES[properties["Bucket"]] = properties["PolicyDocument"]
    return "policy"


def make_provider(_name: str, properties: Any, *_: str) -> str:
    PROVIDERS.append(properties["Url"])
    return MADE_PROVIDER


TAUGHT = [  # moto finds them as long as they are referred to
    teach("AWS::SecretsManager::Secret", "secretsmanager", make_secret),
    teach("AWS::S3::BucketPolicy", "s3", make_policy),
    teach("AWS::IAM::OIDCProvider", "iam", make_provider),
]


class Stack:
    """The stack, created in the sandbox; ``lines`` are those for conf/pipeline.yaml."""

    def __init__(self, sandbox: Sandbox, slack: str, folder: Path, given: dict[str, str]) -> None:
        self.sandbox, self.key = sandbox, given.get("KmsKey", "")
        parameters = {
            "Host": sandbox.redshift.host,
            "Port": str(sandbox.redshift.port),
            "Database": DATABASE,
            "DatabaseUser": USER,
            "AlertEmail": "etl@example.org",
            "SlackWebhook": slack,
        } | given
        formation = sandbox.client("cloudformation")
        name = formation.create_stack(
            StackName=f"spacex-{random.randrange(10**9)}",
            TemplateBody=STACK.read_text(),
            Parameters=[
                {"ParameterKey": name, "ParameterValue": value}
                for name, value in parameters.items()
            ],
            Capabilities=["CAPABILITY_IAM"],
        )["StackId"]
        (created,) = formation.describe_stacks(StackName=name)["Stacks"]
        self.outputs = {each["OutputKey"]: each["OutputValue"] for each in created["Outputs"]}
        self.resources = {
            each["LogicalResourceId"]: each["PhysicalResourceId"]
            for each in formation.describe_stack_resources(StackName=name)["StackResources"]
            if "LogicalResourceId" in each  # moto also lists what a condition leaves out
        }
        self.lines = yaml.safe_load(self.outputs["Configuration"])
        self.bucket = self.lines["staging"]["bucket"]
        iam, sts = sandbox.client("iam"), sandbox.client("sts")
        self.roles: dict[str, Any] = {}
        self.statements: dict[str, list[dict[str, Any]]] = {}
        self.keys: dict[str, Any] = {}
        for role in {"InstanceRole", "CopyRole", "DeployRole"} & self.resources.keys():
            name = self.resources[role]
            self.roles[role] = iam.get_role(RoleName=name)["Role"]
            (policy,) = iam.list_role_policies(RoleName=name)["PolicyNames"]
            policy = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            # Moto's CloudFormation stores str() of it, and None for AWS::NoValue.
            self.statements[role] = [each for each in literal_eval(policy)["Statement"] if each]
            assumed = sts.assume_role(RoleArn=self.roles[role]["Arn"], RoleSessionName="test")
            self.keys[role] = assumed["Credentials"]
        self.config = folder / "pipeline.yaml"
        text = main.DEFAULT_CONFIG.read_text()
        for line in re.findall(r"^  .+", self.outputs["Configuration"], re.MULTILINE):
            name = line.partition(":")[0]
            text, times = re.subn(rf"^{name}:.*", line, text, flags=re.MULTILINE)
            assert times == 1
        self.config.write_text(text)

    def allows(self, role: str, action: str, resource: str, tls: bool = True) -> bool:
        """What IAM would say, of policies that have no more in them than this knows."""
        for statement in self.statements[role]:
            assert statement.keys() == {"Effect", "Action", "Resource"}
            assert statement["Effect"] == "Allow"
        for statement in POLICIES[self.bucket]["Statement"]:
            assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
            assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
            if not tls and covers(statement, action, resource):
                return False
        return any(covers(each, action, resource) for each in self.statements[role])

    def secret_arn(self, name: str) -> str:
        return str(self.sandbox.secrets.describe_secret(SecretId=name)["ARN"])

    def password(self) -> str:
        """The database user's, from the stack's secret."""
        secret = self.sandbox.secrets.get_secret_value(SecretId=self.outputs["Secret"])
        return str(json.loads(secret["SecretString"])["PASSWORD"])


@pytest.fixture
def slack(sandbox: Sandbox) -> Iterator[Source]:
    with Source("/services/x", b"ok") as slack:
        server = slack.server
        server.socket = sandbox.redshift.tls.wrap_socket(server.socket, server_side=True)
        slack.url = f"https://localhost:{server.server_port}/services/x"
        yield slack


@pytest.fixture
def make_stack(sandbox: Sandbox, slack: Source, tmp_path: Path) -> Callable[..., Stack]:
    return lambda **given: Stack(sandbox, slack.url, tmp_path, given)


@pytest.fixture
def stack(make_stack: Callable[..., Stack], request: pytest.FixtureRequest) -> Stack:
    return make_stack(**getattr(request, "param", {}))


@pytest.fixture
def gateway(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """IAM for the program and for the COPY of the stand-in for Redshift."""
    with Gateway(stack) as gateway:
        keys = stack.keys["CopyRole"]
        s3 = stack.sandbox.client(
            "s3",
            endpoint_url=gateway.url,
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            aws_session_token=keys["SessionToken"],
        )
        monkeypatch.setattr(stack.sandbox.redshift, "s3", s3)
        yield gateway


@pytest.fixture
def instance(stack: Stack, gateway: Gateway, tmp_path: Path) -> Iterator[dict[str, str | None]]:
    """The environment on an EC2 instance with the stack's role, and nothing else set."""
    with Metadata(stack.keys["InstanceRole"]) as metadata:
        empty = tmp_path / "home"
        empty.mkdir()
        yield {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
            "AWS_ENDPOINT_URL": gateway.url,
            "AWS_ACCESS_KEY_ID": None,
            "AWS_SECRET_ACCESS_KEY": None,
            "AWS_REGION": None,
            "HOME": str(empty),
            "REQUESTS_CA_BUNDLE": str(stack.sandbox.redshift.ca),  # for Slack
        }


# --- the database user --------------------------------------------------------------------------


def readme_sql(begin: str) -> str:
    """The README's block of SQL that begins so, for the test's user."""
    (found,) = [block for block in blocks("sql") if block.startswith(begin)]
    return re.sub(r"\bloader\b", USER, found)


@pytest.fixture
def create_user(sandbox: Sandbox) -> Iterator[Callable[[str], None]]:
    """Makes the database user as the README says, with only the rights that the README names."""

    def create(password: str) -> None:
        with sandbox.redshift.connect() as connection:
            connection.execute(readme_sql("CREATE USER").replace("…", password))
        sandbox.redshift.users[USER] = password

    with sandbox.redshift.connect() as connection:
        connection.execute(f"REVOKE TEMP ON DATABASE {DATABASE} FROM PUBLIC")
        yield create
        connection.execute(f"GRANT TEMP ON DATABASE {DATABASE} TO PUBLIC")
        if sandbox.redshift.users.pop(USER, None):
            connection.execute(f"DROP OWNED BY {USER} CASCADE; DROP USER {USER}")


# --- tests --------------------------------------------------------------------------------------


def test_cfn_lint_finds_nothing() -> None:
    found = cfnlint.lint(STACK.read_text(), regions=[REGION, "us-east-1"])
    assert [str(match) for match in found] == []


def test_what_is_optional_is_left_out(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    assert {"LogGroup", "DeployRole", "GitHub"} & stack.resources.keys() == set()
    assert {"LogGroup", "GitHubVariables"} & stack.outputs.keys() == set()
    assert trusted(stack, "InstanceRole") == {"Service": "ec2.amazonaws.com"}
    stack = make_stack(RunsOn="ecs-tasks.amazonaws.com")
    assert trusted(stack, "InstanceRole") == {"Service": "ecs-tasks.amazonaws.com"}
    assert stack.outputs["Role"] == stack.roles["InstanceRole"]["Arn"]
    assert "InstanceProfile" not in stack.resources


def trusted(stack: Stack, role: str) -> dict[str, str]:
    (statement,) = stack.roles[role]["AssumeRolePolicyDocument"]["Statement"]
    return dict(statement["Principal"])


def test_a_log_group_for_each_stack(sandbox: Sandbox, make_stack: Callable[..., Stack]) -> None:
    """A second stack makes another one, since the first one's is kept."""
    stacks = [make_stack(WithLogGroup="true") for _ in range(2)]
    names = [stack.outputs["LogGroup"] for stack in stacks]
    assert len({*names}) == 2
    found = sandbox.client("logs").describe_log_groups()["logGroups"]
    kept = {group["logGroupName"]: group["retentionInDays"] for group in found}
    assert [kept[name] for name in names] == [90, 90]
    (agent,) = [block for block in blocks("json") if "logs_collected" in block]
    (file,) = json.loads(agent)["logs"]["logs_collected"]["files"]["collect_list"]
    assert f"log={file['file_path']}\n" in (ROOT / "conf" / "cron" / "run").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The README's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_session_manager() -> None:
    """Moto leaves managed policies out."""
    condition = TEMPLATE["Conditions"]["HasSessionManager"]
    assert condition == {"Fn::Equals": [{"Ref": "SessionManager"}, "true"]}
    assert TEMPLATE["Parameters"]["SessionManager"]["Default"] == "false"
    arn = "arn:${AWS::Partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
    (given,) = TEMPLATE["Resources"]["InstanceRole"]["Properties"]["ManagedPolicyArns"]
    assert given["Fn::If"] == ["HasSessionManager", {"Fn::Sub": arn}, {"Ref": "AWS::NoValue"}]


PROVIDER = "arn:aws:iam::123456789012:oidc-provider/token.actions.githubusercontent.com"


@pytest.mark.parametrize(
    ("given", "provider"),
    [({}, MADE_PROVIDER), ({"GitHubProvider": PROVIDER, "KmsKey": KEY}, PROVIDER)],
    ids=["a new provider", "the account's provider and a KMS key"],
)
def test_github_may_deploy_and_no_more(
    make_stack: Callable[..., Stack], given: dict[str, str], provider: str
) -> None:
    PROVIDERS.clear()
    stack = make_stack(GitHubRepository="octo@12/etl@34", **given)
    issuer, job = "token.actions.githubusercontent.com", DEPLOY["jobs"]["deploy"]
    assert [f"https://{issuer}"] * (provider == MADE_PROVIDER) == PROVIDERS
    (trust,) = stack.roles["DeployRole"]["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Federated": provider}
    assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
    subject = f"repo:octo@12/etl@34:environment:{job['environment']}"
    expected = {f"{issuer}:aud": "sts.amazonaws.com", f"{issuer}:sub": subject}
    assert trust["Condition"] == {"StringEquals": expected}

    (upload,) = [step for step in job["steps"] if step.get("name") == "Upload"]
    (prefix,) = re.findall(r'aws s3 cp \S+ "s3://\$BUCKET/(\S+/)\$name"', upload["run"])
    release = f"arn:aws:s3:::{stack.bucket}/{prefix}sequra-challenge-v1.2.0.tar.gz"
    raw = f"arn:aws:s3:::{stack.bucket}/spacex/raw/response.json.gz"
    assert stack.allows("DeployRole", "s3:PutObject", release)
    assert not stack.allows("DeployRole", "s3:GetObject", release)
    assert not stack.allows("DeployRole", "s3:PutObject", raw)
    assert stack.allows("InstanceRole", "s3:GetObject", release)
    assert not stack.allows("InstanceRole", "s3:PutObject", release)
    assert stack.allows("DeployRole", "kms:GenerateDataKey", KEY) == ("KmsKey" in given)

    variables = dict(line.split("=") for line in stack.outputs["GitHubVariables"].splitlines())
    used = {*re.findall(r"vars\.(\w+)", json.dumps(DEPLOY))}
    assert variables.keys() == used
    assert variables["DEPLOY_ROLE"] == stack.roles["DeployRole"]["Arn"]
    assert variables["DEPLOY_BUCKET"] == stack.bucket


@pytest.mark.parametrize(
    ("parameter", "good", "bad"),
    [
        ("AlertEmail", ["", "me@example.org"], ["me", "me@example", "a@b.de, c@d.de"]),
        ("Prefix", ["spacex", "sequra-challenge-2/a"], ["sequra-challenge", "sequra-challenge/a"]),
        ("GitHubRepository", ["", "a/b.c", "a@1/b@2"], ["a", "a/*", "https://github.com/a/b"]),
        ("GitHubProvider", ["", PROVIDER], [PROVIDER.replace("githubusercontent", "gitlab")]),
    ],
)
def test_parameters_are_checked(parameter: str, good: list[str], bad: list[str]) -> None:
    pattern = TEMPLATE["Parameters"][parameter]["AllowedPattern"]
    matches = {value: bool(re.fullmatch(pattern, value)) for value in good + bad}
    assert matches == dict.fromkeys(good, True) | dict.fromkeys(bad, False)


@pytest.mark.parametrize("stack", [{"KmsKey": KEY}], indirect=True, ids=["with a KMS key"])
def test_on_an_instance_with_the_stacks_role(
    sandbox: Sandbox,
    stack: Stack,
    gateway: Gateway,
    slack: Source,
    instance: dict[str, str | None],
    create_user: Callable[[str], None],
) -> None:
    """Credentials and region from IMDSv2, the outputs as configuration, every request allowed."""
    create_user(stack.password())
    launches = json.loads(SAMPLE.read_bytes())
    # So long, compressed as well, that it is uploaded in parts.
    launches[0]["noise"] = base64.b64encode(random.randbytes(9 << 20)).decode()
    sandbox.source.body = json.dumps(launches).encode()

    loaded(sandbox, "--config", stack.config, **instance)
    assert sandbox.query("SELECT count(*) FROM launches") == [{"count": 30}]
    copies = [sql for sql in sandbox.redshift.statements if sql.startswith("COPY")]
    role = stack.outputs["CopyRole"]
    assert [f"IAM_ROLE '{role}'\nREGION '{REGION}'" in sql for sql in copies] == [True, True]
    keys = [each["Key"] for each in sandbox.s3.list_objects_v2(Bucket=stack.bucket)["Contents"]]
    assert {key.split("/")[1]: days_kept(key) for key in keys} == {
        "public.launches": 30,
        "public.launch_cores": 30,
        "raw": 400,
    }

    # That response again; then an upload that breaks off, of which an alert tells.
    (raw,) = (key for key in keys if "/raw/" in key)
    replay = "--source", f"s3://{stack.bucket}/{raw}", "--config", stack.config
    loaded(sandbox, *replay, **instance)
    gateway.broken = lambda path: "partNumber=2" in path
    with alerts(stack) as received:
        done = sandbox.run("--config", stack.config, patch="ALERT_SECONDS = 60", **instance)
        assert_failed(done, "broken by the test")
        assert "broken by the test" in received()
        assert b"broken by the test" in b"".join(slack.posted)

    granted = {
        role: {action for each in statements for action in as_list(each["Action"])}
        for role, statements in stack.statements.items()
    }
    # Redshift needs to list a bucket, the stand-in for it does not.
    assert granted == gateway.used | {"CopyRole": gateway.used["CopyRole"] | {"s3:ListBucket"}}


def days_kept(key: str) -> int:
    """How long the stack's bucket keeps an object."""
    defaults = {name: each.get("Default") for name, each in TEMPLATE["Parameters"].items()}
    rules = TEMPLATE["Resources"]["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    days = [
        defaults[rule["ExpirationInDays"]["Ref"]]
        for rule in rules
        if "Prefix" in rule
        and key.startswith(
            re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], rule["Prefix"]["Fn::Sub"])
        )
    ]
    return int(min(days))  # S3 honours the shorter of two times


@contextlib.contextmanager
def alerts(stack: Stack) -> Iterator[Callable[[], str]]:
    """What the stack's topic hands on meanwhile."""
    sqs, sns = stack.sandbox.client("sqs"), stack.sandbox.client("sns")
    queue = sqs.create_queue(QueueName="alerts")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]
    topic = stack.lines["alerts"]["sns_topic"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn["QueueArn"])
    yield lambda: str(sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages"))
    sqs.delete_queue(QueueUrl=queue)


def test_the_roles_can_do_nothing_else(stack: Stack) -> None:
    """Neither with another bucket, another prefix, another secret nor another topic."""
    theirs = f"arn:aws:s3:::{stack.bucket}"
    raw = f"{theirs}/spacex/raw/response.json.gz"
    topic, secret = stack.lines["alerts"]["sns_topic"], stack.outputs["Secret"]
    for role, action, resource in [
        ("InstanceRole", "s3:GetObject", raw.replace(stack.bucket, "my-data-bucket")),
        ("InstanceRole", "s3:PutObject", raw.replace("spacex", "other")),
        ("InstanceRole", "s3:DeleteObject", raw),
        ("InstanceRole", "s3:ListBucket", theirs),
        ("InstanceRole", "secretsmanager:GetSecretValue", stack.secret_arn(SECRET)),
        ("InstanceRole", "secretsmanager:PutSecretValue", secret),
        ("InstanceRole", "sns:Publish", f"{topic}-2"),
        ("InstanceRole", "sns:Subscribe", topic),
        ("CopyRole", "s3:GetObject", raw.replace(stack.bucket, "my-data-bucket")),
        ("CopyRole", "s3:PutObject", raw),
        ("CopyRole", "secretsmanager:GetSecretValue", secret),
    ]:
        assert not stack.allows(role, action, resource)
    assert stack.allows("InstanceRole", "s3:GetObject", raw)
    assert not stack.allows("InstanceRole", "s3:GetObject", raw, tls=False)


def test_the_readmes_policies_are_the_stacks(stack: Stack) -> None:
    policies = [json.loads(block) for block in blocks("json") if '"Statement"' in block]
    written = json.dumps(policies)
    written = written.replace("my-data-bucket", stack.bucket).replace("/loader", f"/{USER}")
    instance, copy, trust = (policy["Statement"] for policy in json.loads(written))
    assert trust == stack.roles["CopyRole"]["AssumeRolePolicyDocument"]["Statement"]
    assert copy == stack.statements["CopyRole"]
    # The secret and the topic have other names there; the secret is the sandbox's.
    (_, secret, topic), stacks = instance, stack.statements["InstanceRole"]
    assert fnmatchcase(stack.secret_arn(SECRET), secret["Resource"])
    assert topic["Resource"].split(":")[:5] == stacks[2]["Resource"].split(":")[:5]
    secret["Resource"], topic["Resource"] = stacks[1]["Resource"], stacks[2]["Resource"]
    assert instance == stacks


@pytest.mark.parametrize(
    ("external_id", "allowed"),
    [
        (f"arn:aws:redshift:eu-west-1:123456789012:dbuser:my-cluster/{USER}", True),
        (f"arn:aws:redshift:us-east-1:123456789012:dbuser:serverless-123456789012-1/{USER}", True),
        ("arn:aws:redshift:eu-west-1:123456789012:dbuser:my-cluster/analyst", False),
        (f"arn:aws:redshift:eu-west-1:210987654321:dbuser:my-cluster/{USER}", False),
    ],
)
def test_only_the_loaders_copy_gets_the_role(stack: Stack, external_id: str, allowed: bool) -> None:
    (statement,) = stack.roles["CopyRole"]["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Principal"]["Service"] == [
        "redshift.amazonaws.com",
        "redshift-serverless.amazonaws.com",
    ]
    (pattern,) = statement["Condition"].pop("StringLike").values()
    assert not statement["Condition"]
    assert fnmatchcase(external_id, pattern) == allowed


def test_access_denied_is_explained(
    sandbox: Sandbox,
    stack: Stack,
    instance: dict[str, str | None],
    create_user: Callable[[str], None],
) -> None:
    create_user(stack.password())
    stack.config.write_text(stack.config.read_text().replace(stack.bucket, "my-data-bucket"))
    done = sandbox.run("--config", stack.config, **instance)
    assert done.returncode == 1
    assert re.search(
        r"cannot write s3://my-data-bucket/spacex/\S+ "
        rf"as arn:aws:sts::123456789012:assumed-role/{stack.resources['InstanceRole']}/test: "
        r".*AccessDenied.* is not authorized to perform: s3:PutObject",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("way", "can_alter"), [("ALTER TABLE public.launches OWNER", True), ("GRANT SELECT", False)]
)
def test_tables_that_somebody_else_created(
    sandbox: Sandbox, create_user: Callable[[str], None], way: str, can_alter: bool
) -> None:
    """The README's two ways to hand them over; only the owner can add a column."""
    loaded(sandbox)  # as the schema's owner
    create_user("Another-1")
    with sandbox.redshift.connect() as connection:
        connection.execute(readme_sql(way))
    values = sandbox.secret() | {"USER": USER, "PASSWORD": "Another-1"}
    sandbox.secrets.put_secret_value(SecretId=SECRET, SecretString=json.dumps(values))

    loaded(sandbox)
    with sandbox.redshift.connect() as connection:
        connection.execute("ALTER TABLE public.launches DROP COLUMN details")
    done = sandbox.run()
    assert done.returncode == (0 if can_alter else 1), done.stderr
    assert ("must be owner of table launches" in done.stderr) != can_alter
